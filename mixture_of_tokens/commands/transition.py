"""The command `mot transition`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.choices import Device, Schedule, Scores

if TYPE_CHECKING:
    from mixture_of_tokens.conversion.transition import Transitioned
    from mixture_of_tokens.runs.records import RunConfig


@calls("conversion.transition")
def transition(
    run: Path,
    *,
    out: Path | None = None,
    steps: int | None = None,
    top_k: int | None = None,
    capacity: float | None = None,
    scores: Scores | None = None,
    norm_topk_prob: bool = False,
    calibrate: Literal["distil", "none"] = "distil",
    distil_steps: int | None = None,
    optimizer: Literal["carried", "fresh"] = "carried",
    schedule: Schedule = "own",
    learning_rate: float | None = None,
    minutes: float | None = None,
    device: Device | None = None,
    shard: int | None = None,
    replicate: int | None = None,
    expert_parallel: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> "Transitioned | RunConfig | None":
    """Turn a finished Mixture of Tokens into Token Choice, which serves each text by itself, and train it on.

    All weights carry over, and training goes on in the text where the source stopped. The new run inherits its source's
    metrics, clock and step count, so that mot report plots one curve; its checkpoints count from 0.

    Args:
        run: The source, a finished run directory of mot train. It is only read.
        out: The new run directory; by default RUN-transition beside it.
        steps: Steps of training after the switch, by default a tenth of the source's. 0 switches and trains nothing.
        top_k: Experts a token goes to; by default the granularity, at equal FLOPs.
        capacity: Capacity factor in training: an expert drops tokens beyond this many times its even share. The paper
            has 1.25; by default nothing is dropped.
        scores: Gates of the new model: softmax over the experts, the default (exports as Qwen3-MoE), or a sigmoid each
            (Dots1), the default where there are shared experts.
        norm_topk_prob: Divide the gates of a token's experts by their sum, as Qwen3-MoE does.
        calibrate: What is fitted at the switch, so that the loss does not jump. distil fits all weights of the sparse
            layers to what these give for a text alone; none is the paper's plain switch.
        distil_steps: Steps of distillation for each layer, by default 2,000; a source that was trained longer may need
            more.
        optimizer: carried takes the optimizer's moments from the source's last checkpoint, but for distilled weights.
        schedule: continued holds the source's last learning rate; decay falls from there to a tenth of it, for sources
            with a constant rate; own warms up, for a tenth of the steps at most, and falls to a tenth of the peak.
        learning_rate: The peak, or what is held; by default a quarter of the source's peak if own, else its last one.
        minutes: In place of --steps: as many as fit beside evaluations and the scoring at the end, by a few that are
            timed first. What is fitted at the switch comes on top.
        device: cpu or cuda; by default cuda where there is one.
        shard: As in mot train, and the next two; each process makes the switch on a whole model before that.
        replicate: Copies of a sharded model.
        expert_parallel: Processes that divide the experts, where experts are balanced by construction.
        resume: Go on from the newest valid checkpoint of the new run.
        dry_run: As in mot train.

    Returns the run's stages, with `dry_run` its configuration; None in all processes of torchrun but the first.

    Raises ValueError for a source that cannot be switched, or whose text or optimizer state is missing.
    """
    ...
