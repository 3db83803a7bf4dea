"""Finished runs compared: which model reaches which one's final loss, when, and at what cost.

Models are compared at equal steps, or after equal minutes, by their final loss, over the whole split or what was scored
of it. Only a run that continues another, as `mot transition` makes it, stands beside that one with more steps.
Everything else is read off the evaluations during training, over one fixed part of the split that is the same for all:

    reached     where a run's evaluation loss first falls to another's last one, on a straight line between two
                evaluations; its first evaluation if that is low enough already. None: never
    of_steps    that step over the step of the other's last evaluation; the same for time and FLOPs
    equal_time  the loss when the fastest run of the same seed ended, on a straight line between two evaluations

Where the curve is convex the line lies above it, so `reached` is late rather than early. Evaluations that a run has
from the one that it continues do not count as its own, beside that one. All is computed seed by seed, against the other
model's run of the same seed; a mean comes with the least and the greatest.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mixture_of_tokens.planning.cost import memory, parameters
from mixture_of_tokens.reports.labels import labels
from mixture_of_tokens.reports.origins import Origin
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.preconditions import check_comparable
from mixture_of_tokens.runs.run import Point, Run, read_run
from mixture_of_tokens.runs.typed import FORMAT, as_fields
from mixture_of_tokens.settings.routings import properties
from mixture_of_tokens.utils.files import write_text
from mixture_of_tokens.utils.formatting import Result, Summary, listing

COMPARISON = "compare.json"
STEPS = "--steps"  # of the conditions; a run that continues another has more
ENVIRONMENT = ("hardware", "cores", "threads", "versions", "commit")
WAYS = (records.IN_GROUPS, records.ALONE_BY_FEW, records.ALONE)  # in which texts are served, in the order of tables
# The name of a share, and the field of `Point` that it is a share of.
RATIOS = {"steps": "step", "time": "seconds", "flops": "flops"}

Amount = TypeVar("Amount", float, Summary | None)


@dataclass(frozen=True)
class Reached(Generic[Amount]):
    """When a run reaches another's last loss; the last three as shares of what the other took.

    Of a model the same over its seeds; None where no run ever does.
    """

    step: Amount
    seconds: Amount
    flops: Amount
    of_steps: Amount
    of_time: Amount
    of_flops: Amount

    @classmethod
    def over(cls, found: Sequence["Reached[float] | None"]) -> "Reached[Summary | None]":
        names = [field.name for field in dataclasses.fields(cls)]
        return Reached(*(Summary.of(each and getattr(each, name) for each in found) for name in names))


@dataclass(frozen=True)
class ComparedRun:
    """A run of a model in a comparison; `reached` is by the other model's label."""

    seed: int
    directory: str
    final_loss: float
    bits_per_byte: float
    seconds: float
    regrouping_spread: float | None
    served: dict[str, float]
    seconds_per_step: float
    tokens_per_second: float
    equal_time_loss: float | None
    reached: dict[str, Reached[float] | None]
    curve: list[Point]


@dataclass(frozen=True)
class ComparedModel:
    """A model in a comparison: what it is, and what came out, over the seeds.

    steps: with those of the run that it continues; continues: the label of that run's model, where it is here.
    properties: see `routings.properties`; served: see `RunFacts`, the losses that all seeds have; few_of_experts: how
        many experts serve a text alone there, and of how many. Differences are to the baseline, seed by seed; memory
        is `cost.memory`'s estimate in bytes; speed and cost of a switched model are of the part after the switch.
    """

    label: str
    name: str
    steps: int
    switched: bool
    properties: dict[str, str]
    learning_rate: float
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    memory_estimate: int
    final_loss: Summary
    bits_per_byte: Summary
    seconds: Summary
    seconds_per_step: Summary
    tokens_per_second: Summary
    equal_time_loss: Summary | None
    regrouping_spread: Summary | None
    served: dict[str, Summary]
    few_of_experts: tuple[int, int]
    continues: str | None
    reached: dict[str, Reached[Summary | None]]
    runs: list[ComparedRun]
    final_loss_difference: Summary
    equal_time_loss_difference: Summary | None

    @property
    def shows_ways(self) -> bool:
        """Whether it can be served in groups and alone, and was."""
        return {records.IN_GROUPS, records.ALONE} <= self.served.keys()


@dataclass(frozen=True)
class Comparison(Result):
    """All numbers of a comparison: what compare.json holds. The first model is the baseline.

    steps: the baseline's; command: that made it, of `mot compare`; scored_tokens: whose loss is the final one, where
        that is not all of the text; origin: what all began with, of runs that began with a trained model. Losses are
        nats a token.
    """

    baseline: str
    seeds: list[int]
    steps: int
    batch_size: int
    context: int
    group_size: int
    evaluated_on: str
    equal_time_seconds: Summary
    corpus: dict[str, Any]
    environments: list[dict[str, Any]]
    models: list[ComparedModel]
    command: str | None = None
    scored_tokens: int | None = None
    origin: Origin | None = None

    @property
    def begins_trained(self) -> bool:
        """Whether all runs begin with trained weights, whose loss is that of step 0."""
        return all(run.curve[0].step == 0 for model in self.models for run in model.runs)

    @property
    def at_equal_steps(self) -> bool:
        return {model.steps for model in self.models} == {self.steps}

    def relative(self, to: Path) -> "Comparison":
        """The same, its directories relative to another, so that all of it can be moved."""

        def moved(run: ComparedRun) -> ComparedRun:
            return dataclasses.replace(run, directory=os.path.relpath(run.directory, to))

        models = [dataclasses.replace(model, runs=list(map(moved, model.runs))) for model in self.models]
        return dataclasses.replace(self, models=models)

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT} | super().as_dict()


def by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each model, by seed. The keys are names, with the settings in which models of one name differ.

    Raises ValueError for runs that cannot be compared: without evaluations, on other text, in other groups, for other
    steps unless one continues the other, or where not every model has the same seeds.
    """
    if not runs:
        raise ValueError("name at least one run directory")
    for run in runs:
        run.check_evaluated()
        runs[0].check_same_text(run)
    conditions = {str(run.directory): run.config.conditions() for run in runs}
    check_comparable({run: {what: own[what] for what in own if what != STEPS} for run, own in conditions.items()})
    _check_steps(runs)
    models: list[list[Run]] = []
    for run in runs:
        model = next((model for model in models if model[0].settings == run.settings), None)
        if model is None:
            models.append([run])
        elif run.seed in (same := {other.seed: other.directory for other in model}):
            raise ValueError(f"{same[run.seed]} and {run.directory} are the same model with the same seed")
        else:
            model.append(run)
    for model in models:
        model.sort(key=lambda run: run.seed)
        for run in model[1:]:
            if [row.step for row in run.evaluations] != [row.step for row in model[0].evaluations]:
                pair = f"{model[0].directory} and {run.directory}"
                raise ValueError(f"{pair} are seeds of one model, but were evaluated after different steps")
    seeds = [[run.seed for run in model] for model in models]
    for model, own in zip(models, seeds, strict=True):
        if own != seeds[0]:
            raise ValueError(
                f"runs are compared seed by seed, and {models[0][0].name} has the seeds {listing(seeds[0])}, "
                f"{model[0].name} {listing(own)}"
            )
    labelled = dict(zip(labels([model[0] for model in models]), models, strict=True))
    assert len(labelled) == len(models)  # a label has all that differs
    return labelled


def _check_steps(runs: Sequence[Run]) -> None:
    """Raises ValueError for unequal steps, unless there is a run of equal ones that continues one of the two, or that
    one of them continues.
    """
    ends = [
        {each.config.conditions()[STEPS] for each in runs if each is run or each.inherited(run) or run.inherited(each)}
        for run in runs
    ]
    for (run, its), (other, theirs) in combinations(zip(runs, ends, strict=True), 2):
        if not its & theirs:
            check_comparable({str(each.directory): {STEPS: each.config.conditions()[STEPS]} for each in (run, other)})


def reached(run: Run, other: Run) -> Reached[float] | None:
    """Where a run reaches another's last evaluation loss, as defined at the top of this file.

    Raises ValueError for runs that saw different text.
    """
    run.check_same_text(other)
    end = other.curve[-1]
    first = run.inherited(other)
    index = next((i for i, point in enumerate(run.curve) if i >= first and point.loss <= end.loss), None)
    if index is None:
        return None
    after, before = run.curve[index], run.curve[max(0, index - 1)]
    share = 1.0 if index == first else (before.loss - end.loss) / (before.loss - after.loss)
    keys = RATIOS.values()
    at = [getattr(before, key) + share * (getattr(after, key) - getattr(before, key)) for key in keys]
    return Reached(*at, *(value / getattr(end, key) for value, key in zip(at, keys, strict=True)))


def comparison(models: dict[str, list[Run]], command: str | None = None, origins: Sequence[Run] = ()) -> Comparison:
    """All numbers of the runs that `by_model` returned; `origins` as `without_origins` gives them."""
    baseline = next(iter(models.values()))
    ends = [min(model[i].curve[-1].seconds for model in models.values()) for i in range(len(baseline))]
    runs = {label: _runs(model, models, ends) for label, model in models.items()}
    of_baseline = next(iter(runs.values()))
    environments: list[dict[str, Any]] = []
    for run in (run for model in models.values() for run in model):
        environment = {key: getattr(run.facts, key) for key in ENVIRONMENT}
        if environment not in environments:
            environments.append(environment)
    config = baseline[0].config
    return Comparison(
        baseline=next(iter(models)),
        seeds=[run.seed for run in baseline],
        steps=baseline[0].facts.steps,
        batch_size=config.batch_size,
        context=config.model_config.max_position_embeddings,
        group_size=config.group_size,
        evaluated_on=config.evaluate_on,
        equal_time_seconds=Summary.over(ends),
        corpus=baseline[0].facts.corpus,
        environments=environments,
        models=[
            _model(label, model, runs[label], of_baseline, _continued(model, models)) for label, model in models.items()
        ],
        command=command,
        scored_tokens=baseline[0].facts.scored_tokens,
        origin=Origin.of(origins) if origins else None,
    )


def _runs(model: list[Run], models: dict[str, list[Run]], ends: list[float]) -> list[ComparedRun]:
    runs = []
    for i, (run, end) in enumerate(zip(model, ends, strict=True)):
        # Speeds are of the part after a switch, if there is one.
        step, tokens, before = 0, 0, 0.0
        if run.switch is not None and run.config.steps:
            step, tokens, before = run.switch.step, run.switch.tokens, run.switch.seconds
        seconds = run.facts.seconds - before
        # Evaluations that it has from a run that it continues: beside that one its own count.
        had = max(run.inherited(others[i]) for others in models.values())
        seconds_of, losses = ([getattr(point, key) for point in run.curve] for key in ("seconds", "loss"))
        so_early = end <= seconds_of[had - 1] if had else end < seconds_of[0]
        runs.append(
            ComparedRun(
                seed=run.seed,
                directory=str(run.directory),
                final_loss=run.facts.final_loss,
                bits_per_byte=run.facts.bits_per_byte,
                seconds=run.facts.seconds,
                regrouping_spread=run.facts.regrouping_spread,
                served=run.facts.served or {},
                seconds_per_step=seconds / (run.facts.steps - step),
                tokens_per_second=(run.facts.tokens - tokens) / seconds,
                equal_time_loss=None if so_early else float(np.interp(end, seconds_of, losses)),
                reached={other: reached(run, theirs[i]) for other, theirs in models.items()},
                curve=run.curve,
            )
        )
    return runs


def _continued(model: list[Run], models: dict[str, list[Run]]) -> str | None:
    """The label of the model that this one continues, on every seed."""
    others = ((label, zip(model, other, strict=True)) for label, other in models.items())
    return next((label for label, pairs in others if all(run.inherited(its) for run, its in pairs)), None)


def _model(
    label: str, model: list[Run], runs: list[ComparedRun], baseline: list[ComparedRun], continues: str | None
) -> ComparedModel:
    first = model[0]
    count = parameters(first.model_config)
    pairs = list(zip(runs, baseline, strict=True))
    ways = [way for way in WAYS if all(way in run.served for run in runs)]
    apart = Summary.of(
        None if mine.equal_time_loss is None or its.equal_time_loss is None
        else mine.equal_time_loss - its.equal_time_loss
        for mine, its in pairs
    )  # fmt: skip
    return ComparedModel(
        label=label,
        name=first.name,
        steps=first.facts.steps,
        switched=first.switch is not None,
        properties=properties(first.model_config.routings),
        learning_rate=first.config.learning_rate,
        parameters={"total": count["total"], "active": count["active"]},
        flops_per_token={"forward": first.training_flops_per_token / 3, "training": first.training_flops_per_token},
        memory_estimate=sum(memory(first.model_config, first.config.micro_batch).values()),
        final_loss=Summary.over(run.final_loss for run in runs),
        bits_per_byte=Summary.over(run.bits_per_byte for run in runs),
        seconds=Summary.over(run.seconds for run in runs),
        seconds_per_step=Summary.over(run.seconds_per_step for run in runs),
        tokens_per_second=Summary.over(run.tokens_per_second for run in runs),
        equal_time_loss=Summary.of(run.equal_time_loss for run in runs),
        regrouping_spread=Summary.of(run.regrouping_spread for run in runs),
        served={way: Summary.over(run.served[way] for run in runs) for way in ways},
        few_of_experts=(first.model_config.num_experts_per_tok, first.model_config.num_experts),
        continues=continues,
        reached={other: Reached.over([run.reached[other] for run in runs]) for other in runs[0].reached},
        runs=runs,
        final_loss_difference=Summary.over(mine.final_loss - its.final_loss for mine, its in pairs),
        equal_time_loss_difference=apart,
    )


def runs_of(directories: Sequence[Path]) -> tuple[list[Run], str | None]:
    """The runs in run directories, comparisons and other folders; the command of a comparison, if no other is given.

    Raises ValueError for what is neither, and for what is damaged.
    """
    runs, command = [], None
    for directory in directories:
        file = directory / COMPARISON
        if file.is_file():
            written = as_fields(file)
            try:
                names = [run["directory"] for model in written["models"] for run in model["runs"]]
                if not names or not all(isinstance(text, str) for text in (*names, written["command"])):
                    raise TypeError
            except (KeyError, TypeError):
                raise ValueError(f"{file} is no comparison of mot compare") from None
            command = written["command"] if len(directories) == 1 else None
            runs += [read_run(directory / name) for name in names]
        elif directory.is_dir() and not any((directory / name).exists() for name in (records.FACTS, records.CONFIG)):
            inside = sorted(file.parent for file in directory.glob(f"*/{records.FACTS}"))
            if not inside:
                what = f"it has no {records.FACTS} and no {COMPARISON}, and no finished runs are in it"
                raise ValueError(f"{directory} is no finished run or comparison: {what}")
            runs += map(read_run, inside)
        else:
            runs.append(read_run(directory))
    return runs, command


def write(result: Comparison, out: Path) -> None:
    """compare.json, whose directories are relative to where it stands."""
    write_text(out / COMPARISON, result.relative(out).to_json() + "\n")
