"""Continuations of the same prompts by trained models, in full groups."""

from pathlib import Path

import torch

from mixture_of_tokens.generation.sampling import Sampling, continue_prompts
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of
from mixture_of_tokens.settings.choices import Device
from mixture_of_tokens.utils.formatting import first_line
from mixture_of_tokens.utils.progress import warn

TEMPERATURE = 0.8
# Short, and as different as the texts of a group in training; the first few are shown.
SHOWN = ("def ", "class ", "The ", "import ")
PROMPTS = (
    *SHOWN,
    *("if ", "for ", "return ", "while ", "from ", "with ", "try:", "else:", "# ", "self.", "raise ", "assert "),
    *("In ", "When ", "A ", "This ", "It ", "There ", "If ", "To ", "He ", "We ", "On ", "As ", "All ", "For ", "But "),
    "What ",
)


def continued(directories: dict[str, Path], device: Device | None = None) -> dict[str, dict[str, str]]:
    """Continuations of the first prompts by the models of run directories, by prompt and label, with a fixed seed.

    All prompts are one batch. A model has none that is not causal, or that they do not suit: its tokenizer has no token
    for one, or its context is as short as one; or of which the logits are not finite. One that does not load, or for
    which a GPU has too little memory, is named on standard error, and has none. Empty where a run has no model/ any
    more, or no model has one.
    """
    if not all((directory / "model").is_dir() for directory in directories.values()):
        return {}
    written = {prompt: {} for prompt in SHOWN}
    for label, directory in directories.items():
        try:
            texts = _texts(directory, device)
        except (ValueError, torch.OutOfMemoryError) as error:
            warn(f"no samples of {label}: {first_line(error)}")
            continue
        for prompt, text in zip(SHOWN, texts, strict=False):
            written[prompt][label] = text
    return written if any(written.values()) else {}


def _texts(directory: Path, device: Device | None) -> list[str]:
    """The continuations of all prompts; none where they do not suit. Raises ValueError for a model not to be loaded."""
    model, tokenizer = load_model(str(directory), device=device), load_tokenizer_of(str(directory))
    if not model.config.causal:
        return []
    try:
        return continue_prompts(model, tokenizer, PROMPTS, Sampling(temperature=TEMPERATURE))
    except ValueError:
        return []
