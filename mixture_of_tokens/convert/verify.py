"""Whether what was written is the same model: its weights, and its logits by transformers in another process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixture_of_tokens.convert.plain import nothing_shared, plain_weights
from mixture_of_tokens.disk import plain_errors
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM

TOLERANCE = 1e-5  # of a logit, times the logits' standard deviation where that is above 1

# Run by `in_plain_transformers` on the directory and the files of ids and of logits.
CHECK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, given, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    save_file({"logits": model(load_file(given)["ids"]).logits.contiguous()}, found)
"""


def verify(
    run: str, model: MixtureOfTokensForCausalLM, architecture: Any, directory: Path, ids: Tensor, what: str
) -> float:
    """The largest difference of a logit on `ids`, which are `what`.

    Raises ValueError where transformers' model of that architecture in the directory is not `model`, made of `run`.
    """
    not_the_same = f"the checkpoint written from {run} is not the same model, and was removed"
    with nothing_shared():
        written = architecture.from_pretrained(directory, dtype=torch.float32)
    if (name := different_weight(model, written)) is not None:
        raise ValueError(f"{not_the_same}: {name} is not the run's")
    print("Comparing logits with plain transformers', in another process", file=sys.stderr)
    difference, scale = compare_logits(model, directory, ids)
    allowed = TOLERANCE * max(1.0, scale)
    if not difference <= allowed:
        much = f"logits on {what} differ by up to {difference:.1e}, and {allowed:.1e} is allowed"
        raise ValueError(f"{not_the_same}: {much}")
    return difference


def different_weight(model: MixtureOfTokensForCausalLM, plain: Any) -> str | None:
    """The name of a weight that is not exactly the model's. Logits of a few rows do not involve every expert."""
    expected = plain_weights(model)
    found = {name: value for name, value in plain.state_dict().items() if value.numel()}
    names = sorted({*expected, *found})
    return next((name for name in names if not _equal(expected.get(name), found.get(name))), None)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def compare_logits(model: Any, directory: Path, ids: Tensor) -> tuple[float, float]:
    """The largest difference of a model's logits from plain transformers', and their standard deviation.

    Raises ValueError where transformers cannot load the directory.
    """
    given, found = directory / "given.safetensors", directory / "found.safetensors"
    try:
        with plain_errors(directory):
            save_file({"ids": ids.contiguous()}, given)
        in_plain_transformers(CHECK, str(directory), str(given), str(found))
        with torch.no_grad():
            logits = model(ids).logits
        return float((load_file(found)["logits"] - logits).abs().max()), float(logits.std())
    finally:
        given.unlink(missing_ok=True)
        found.unlink(missing_ok=True)


def in_plain_transformers(code: str, *words: str) -> str:
    """What a program prints in another process, which cannot import this package.

    Raises ValueError with the last line of its errors where it fails.
    """
    alone = f"import sys\nsys.modules['mixture_of_tokens'] = None\n{code}"
    done = subprocess.run([sys.executable, "-P", "-c", alone, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"plain transformers cannot load what was written: {last}")
    return done.stdout
