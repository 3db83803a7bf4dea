"""The losses of a trained model as its texts can be served: in groups, each alone, and alone by few experts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from mixture_of_tokens.models.forward_hooks import serving_alone
from mixture_of_tokens.parallel.sharding import is_sharded
from mixture_of_tokens.runs.records import ALONE, ALONE_BY_FEW, IN_GROUPS
from mixture_of_tokens.training.trainer import RunTrainer

ROWS = 256  # alone by all experts costs G times an expert's FLOPs: 2 s of a Nano on two cores
SHARE = 8  # of a short training there are fewer rows: one for so many that were trained on


def losses_as_served(trainer: RunTrainer, rows_trained: int) -> dict[str, float]:
    """By the keys of `RunFacts.served`, all over the same part of the text that training is evaluated on."""
    rows, losses = min(ROWS, rows_trained // SHARE), {}
    for way, served in _ways(trainer):
        with served():
            try:
                losses[way] = trainer.loss_of(trainer.causal_lm, groups=max(1, rows // trainer.rows.group_size))
            except FloatingPointError:  # in all processes; the run has its loss, and a way of serving it has none
                continue
    return losses


def _ways(trainer: RunTrainer) -> Iterator[tuple[str, Callable[[], AbstractContextManager]]]:
    model, routings = trainer.causal_lm, trainer.causal_lm.config.routings
    if model.config.shares_batch:
        yield IN_GROUPS, nullcontext
    if not model.config.serves_alone:
        return
    yield ALONE, (lambda: serving_alone(model)) if model.config.shares_batch else nullcontext
    mixing = [routing for routing in routings if routing.reads_mixtures]
    several = model.config.group_size > 1 and model.config.num_experts_per_tok < model.config.num_experts
    if model.config.shares_batch and all(routing.routed for routing in mixing) and several and not is_sharded(model):
        yield ALONE_BY_FEW, lambda: serving_alone(model, model.config.num_experts_per_tok)
