"""The trained model that runs began with (`mot train --from`), and that they are counted from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mixture_of_tokens.reports.labels import labels
from mixture_of_tokens.runs.run import Point, Run
from mixture_of_tokens.runs.warm_start import began_with
from mixture_of_tokens.utils.formatting import Summary


@dataclass(frozen=True)
class Origin:
    """The trained model that all runs of a comparison began with.

    final_loss: over the same split as theirs, `scored_tokens` of it or all.
    curves: by seed, of which each ends at 0 steps, tokens, seconds and FLOPs.
    """

    label: str
    steps: int
    final_loss: Summary
    scored_tokens: int | None
    curves: list[list[Point]]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Origin":
        keys = ("step", "tokens", "seconds", "flops")

        def before_zero(run: Run) -> list[Point]:
            end = run.curve[-1]
            moved = [{key: getattr(point, key) - getattr(end, key) for key in keys} for point in run.curve]
            return [dataclasses.replace(point, **at) for point, at in zip(run.curve, moved, strict=True)]

        return cls(
            label=labels(runs[:1])[0],
            steps=runs[0].config.last_step,
            final_loss=Summary.over(run.facts.final_loss for run in runs),
            scored_tokens=runs[0].facts.scored_tokens,
            curves=list(map(before_zero, runs)),
        )


def without_origins(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs but for those that all others began with, and these.

    Steps and time of the others are then counted from where these ended.
    """
    origins = [run for run in runs if any(began_with(other, run) for other in runs)]
    others = [run for run in runs if run not in origins]
    if not all(any(began_with(run, origin) for origin in origins) for run in others):
        return list(runs), []
    for run, origin in ((run, origin) for run in others for origin in origins):
        run.check_same_text(origin)
    return others, origins
