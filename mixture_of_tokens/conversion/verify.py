"""Whether what was written is the same model: its weights, and its logits by transformers in another process."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixture_of_tokens.conversion.to_hf import plain_weights, zeros_for
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.utils.files import plain_errors
from mixture_of_tokens.utils.progress import say

TOLERANCE = 1e-5  # of a logit, times the logits' standard deviation where that is above 1

# Run by `in_plain_transformers` on the directory, the files of ids and of logits, and of a folder for code, or none.
CHECK = """
import os, sys
directory, given, found, code = sys.argv[1:]
if code:
    os.environ["HF_MODULES_CACHE"] = code
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=bool(code)).eval()
AutoTokenizer.from_pretrained(directory, trust_remote_code=bool(code))
with torch.no_grad():
    save_file({"logits": model(load_file(given)["ids"]).logits.contiguous()}, found)
"""


def verify(
    run: str, model: MixtureOfTokensForCausalLM, architecture: Any, directory: Path, ids: Tensor, what: str
) -> float:
    """The largest difference of a logit on `ids`, which are `what`.

    Args:
        architecture: the class of the model in the directory; this library's of one that brings its own code.

    Raises ValueError where that is not `model`, made of `run`.
    """
    not_the_same = f"what was written from {run} is not the same model, and was removed"
    own = architecture is MixtureOfTokensForCausalLM
    with torch.device("cpu"):
        written = architecture.from_pretrained(directory, dtype=torch.float32)
    weights, found = model.state_dict() if own else plain_weights(model), written.state_dict()
    expected = weights | zeros_for(written, weights)
    for name in sorted({*expected, *found}):  # logits of a few rows do not involve every expert
        if name not in expected or name not in found or not torch.equal(expected[name], found[name]):
            raise ValueError(f"{not_the_same}: {name} is not the run's")
    say("Comparing logits with plain transformers', in another process")
    with TemporaryDirectory() as code:
        difference, scale = compare_logits(model, directory, ids, code if own else "")
    allowed = TOLERANCE * max(1.0, scale)
    if not difference <= allowed:
        much = f"logits on {what} differ by up to {difference:.1e}, and {allowed:.1e} is allowed"
        raise ValueError(f"{not_the_same}: {much}")
    return difference


def compare_logits(model: Any, directory: Path, ids: Tensor, code: str = "") -> tuple[float, float]:
    """The largest difference of a model's logits from plain transformers', and their standard deviation.

    Args:
        code: a folder that transformers may copy the directory's code to, and run it; by default it runs none.

    Raises ValueError where transformers cannot load the directory.
    """
    given, found = directory / "given.safetensors", directory / "found.safetensors"
    try:
        with plain_errors(directory):
            save_file({"ids": ids.contiguous()}, given)
        in_plain_transformers(CHECK, str(directory), str(given), str(found), code)
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
