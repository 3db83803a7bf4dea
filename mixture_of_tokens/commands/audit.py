"""The command `mot audit`."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.choices import Device, Expected

if TYPE_CHECKING:
    from mixture_of_tokens.evaluation.audit import Audit


@calls("evaluation.audit")
def audit(
    run: str | Path,
    *,
    expect: Expected | None = None,
    alone: bool = False,
    experts: int | None = None,
    length: int | None = None,
    batches: int = 3,
    seed: int = 0,
    device: Device | None = None,
) -> "Audit":
    """Look for leaks from the future and from batch-mates, by changing one thing and looking at everything else.

    Causal: no logit moves when later tokens change, in its own row or in others. Private: causal, and no logit moves
    when other rows of the batch change. Separate: no logit of a document moves when the one before it in its row
    changes; looked for where a run was trained so, or where it is expected. All positions of the texts are looked at.
    These are of the run where its text is known, or else random tokens.

    Args:
        run: A run directory, a checkpoint, nano (a small model that comes with the library), or the name of a causal
            language model on the Hub.
        expect: Exit with status 1 unless the model is this; from Python, `failure` of what is returned says so.
        alone: Audit a Mixture of Tokens as `mot generate --alone` serves it.
        experts: With --alone, experts that a token goes to; by default all.
        length: Tokens of a text, at most the model's context; by default 64, or fewer where logits would take much
            memory. Time grows with its square.
        batches: Number of batches.
        seed: Seed of the batches and of the replaced tokens.
        device: cpu or cuda; by default cuda where there is one.

    Raises ValueError for bad options and for a run without a model.
    """
    ...
