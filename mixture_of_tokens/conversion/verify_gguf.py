"""Whether llama.cpp computes from a GGUF file what transformers computes from the model, and at what loss."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mixture_of_tokens.conversion import llama_cpp
from mixture_of_tokens.conversion.to_gguf import quantized
from mixture_of_tokens.settings.choices import Quantize

ENGINE = "xllamacpp"
TOLERANCE = 1e-4  # of a log probability, in fp32
ROWS, LENGTH = 8, 63  # compared at most; all positions of a row at once
PROBABILITIES = 2**22  # compared at most, each of which the engine writes as text
PROMPT, NEW = 8, 40  # tokens, of what is written greedily
LINES = 50
HARD = [
    "é = 'naïve café'",
    "x = '日本語'",
    "\tif a:\n\t\t\n  b",
    "a  \n\n\n  ",
    "it's  we'll 12345 ½",
    "#" * 40 + " 🙂",
]


@dataclass(frozen=True)
class CheckedGguf:
    """What was found of a GGUF file.

    engine: that computed, with its version; None where it is not installed, and the file was read back alone.
    positions: after which log probabilities of the whole vocabulary were compared; difference: the largest.
    loss, loss_of_file: in nats a token over these positions, of the model in fp32 and of the file: by the engine, or
        without one by transformers with the file's weights.
    greedy, lines: tokens that are written alike, and lines that are tokenized alike, of how many.
    """

    engine: str | None
    positions: int
    difference: float | None
    loss: float
    loss_of_file: float
    greedy: tuple[int, int] | None = None
    lines: tuple[int, int] | None = None

    def __str__(self) -> str:
        losses = f"loss over {self.positions} tokens {self.loss_of_file:.4f}, of the model in fp32 {self.loss:.4f}"
        if self.engine is None:
            return f"Read back tensor by tensor; llama.cpp was not asked (pip install {ENGINE}); {losses}."
        assert self.greedy is not None
        assert self.lines is not None
        alike = f"{self.greedy[0]} of {self.greedy[1]} greedy tokens and {self.lines[0]} of {self.lines[1]} lines alike"
        return f"{self.engine}: log probabilities differ by at most {self.difference:.1e}; {alike}; {losses}."


@torch.no_grad()
def check_gguf(
    plain: Any, tokenizer: PreTrainedTokenizerFast, file: Path, ids: Tensor, quantize: Quantize
) -> CheckedGguf:
    """Compare a file with the model that it was written from, in fp32 and on the CPU.

    Args:
        ids: (rows, T) of text.

    Raises ValueError where the engine reads another model: another tokenization, or in f32 other log probabilities.
    """
    rows = max(1, min(ROWS, len(ids)))
    length = max(2, min(LENGTH, ids.shape[1] - 1, PROBABILITIES // plain.config.vocab_size // rows))
    inputs, targets = ids[:rows, :length], ids[:rows, 1 : length + 1]
    expected = plain(inputs).logits.log_softmax(-1)
    loss = _loss(expected, targets)
    if importlib.util.find_spec(ENGINE) is None:
        rounded = torch.func.functional_call(plain, quantized(plain, quantize), (inputs,)).logits.log_softmax(-1)
        return CheckedGguf(None, targets.numel(), None, loss, _loss(rounded, targets))
    questions = questions_of(plain, tokenizer, inputs)
    found = answers_of(file, questions)
    values = torch.from_numpy(found["log_probabilities"])
    difference = float((values - expected).abs().max())
    # Asked to go on beyond the end of a text, the engine never writes the token that ends it.
    greedy = plain_greedy(plain, inputs[:, : questions["prompt"]], questions["new"], tokenizer.eos_token_id)
    agreed = int((torch.from_numpy(found["greedy"]) == greedy).sum())
    theirs, ours = json.loads(str(found["lines"])), ids_of_lines(tokenizer, questions["lines"])
    lines = sum(a == b for a, b in zip(theirs, ours, strict=True))
    checked = CheckedGguf(
        engine=f"llama.cpp ({ENGINE} {importlib.metadata.version(ENGINE)})",
        positions=targets.numel(),
        difference=difference,
        loss=loss,
        loss_of_file=_loss(values, targets),
        greedy=(agreed, greedy.numel()),
        lines=(lines, len(ours)),
    )
    if lines < len(ours) or not np.isfinite(difference) or (quantize == "f32" and difference > TOLERANCE):
        raise ValueError(f"llama.cpp reads another model from the file, which was removed. {checked}")
    return checked


def questions_of(plain: Any, tokenizer: PreTrainedTokenizerFast, inputs: Tensor) -> dict[str, Any]:
    """What `llama_cpp.py` is asked about a model."""
    texts = tokenizer.batch_decode(inputs, skip_special_tokens=True)
    lines = [line for text in texts for line in text.splitlines()]
    lines += [text[i : i + 10] for text in texts for i in range(0, len(text), 10)]  # of texts of few lines
    lines = [line for line in dict.fromkeys(lines) if line.strip()]
    single = (i for i in range(plain.config.vocab_size) if _is_ascii(str(tokenizer.decode([i]))))
    return {
        "rows": inputs.tolist(),
        "lines": [*HARD, *lines[: LINES - len(HARD)]],
        "prompt": min(PROMPT, inputs.shape[1]),
        "new": max(1, min(NEW, plain.config.max_position_embeddings - PROMPT - 1)),
        "forced": next(single, 0),
        "vocab_size": plain.config.vocab_size,
        "threads": torch.get_num_threads(),
    }


def ids_of_lines(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> list[list[int]]:
    """Without a warning of those that are longer than the model's context."""
    return [tokenizer.backend_tokenizer.encode(line).ids for line in lines]


def _is_ascii(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text.isprintable()


def answers_of(file: Path, questions: dict[str, Any], python: str = sys.executable) -> dict[str, np.ndarray]:
    """The answers of llama.cpp, in another process, which it may end. Raises ValueError where it does."""
    with TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "questions.json", Path(folder) / "answers.npz"
        asked.write_text(json.dumps(questions))
        words = [python, "-P", llama_cpp.__file__, str(file), str(asked), str(answered)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            last = next((line for line in reversed(said) if "error" in line.lower()), said[-1] if said else "no reason")
            raise ValueError(f"llama.cpp cannot use the file that was written: {last}")
        with np.load(answered) as read:
            return dict(read)


@torch.no_grad()
def plain_greedy(plain: Any, prompts: Tensor, new: int, never: Any = None) -> Tensor:
    """(rows, new): the continuation of each row, beyond an end of text too. never: a token that is not written."""
    how: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {} if never is None else {"suppress_tokens": [never]}
    how |= {"attention_mask": torch.ones_like(prompts[:1]), "max_new_tokens": new}  # a prompt may hold token 0
    return torch.stack([plain.generate(row[None], **how)[0, len(row) :] for row in prompts])


def _loss(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(-1, targets[..., None]).double().mean())
