"""Text from a model: the command `mot generate`."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from mixture_of_tokens.generation.continuations import Continuation, Row, Writer, say_speed, summary_of, to_file
from mixture_of_tokens.generation.sampling import DEFAULT, Sampling, draw, encode, ends_of
from mixture_of_tokens.generation.stream import Streamer
from mixture_of_tokens.models.generation import CANNOT_WRITE
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.parallel.sharding import broadcast
from mixture_of_tokens.runs.loading import (
    check_tokens,
    context_of,
    group_size_of,
    load_model,
    load_tokenizer_of,
    placed,
    weights_hash,
)
from mixture_of_tokens.runs.locking import owned_file
from mixture_of_tokens.settings.choices import Device, Dtype
from mixture_of_tokens.utils.checks import at_least_one
from mixture_of_tokens.utils.formatting import Result
from mixture_of_tokens.utils.process import is_main, process_count
from mixture_of_tokens.utils.progress import warn

BATCH_SIZE = 32
MOST_SAMPLES = 10**6  # of a prompt


@dataclass(frozen=True)
class Generated(Result):
    """Continuations in the order of the prompts, and the file that they are in. As JSON, a line for each."""

    continuations: list[Continuation]
    file: str | None = None

    def to_json(self) -> str:
        return "\n".join(continuation.line() for continuation in self.continuations)

    def __str__(self) -> str:
        if self.file is not None:
            return summary_of(len(self.continuations), self.file)
        return "\n\n".join(each.prompt + each.text for each in self.continuations)


def generate(
    run: str,
    *,
    prompt: list[str] | None,
    prompts_file: Path | None,
    out: Path | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    samples: int,
    batch_size: int,
    alone: bool,
    experts: int | None,
    seed: int,
    device: Device | None,
    dtype: Dtype | None,
    shard: int | None,
    expert_parallel: int | None,
    stream: TextIO | None,
) -> Generated | None:
    """As the function of `commands/generate.py`, which explains its arguments."""
    at_least_one(samples=samples, batch_size=batch_size, experts=experts)
    if samples > MOST_SAMPLES:
        raise ValueError(f"--samples must be at most {MOST_SAMPLES}, not {samples}")
    _check_flags(prompt or [], prompts_file, out, stream)
    most = DEFAULT.max_new_tokens if max_new_tokens is None else max_new_tokens
    (sampling := Sampling(most, float(temperature), float(top_p), seed)).check()
    prompts = prompt or [] if prompts_file is None else read_prompts(prompts_file)
    placement = placed(shard, expert_parallel, experts)
    model = load_model(run, alone=alone, experts=experts, device=device, dtype=dtype, placement=placement)
    tokenizer = load_tokenizer_of(run)
    if not getattr(model.config, "causal", True):
        raise ValueError(CANNOT_WRITE)
    context = context_of(model)
    # Our models are trained without special tokens; others may need one at the beginning of a text.
    special = not isinstance(model, MixtureOfTokensForCausalLM)
    encoded = encode(tokenizer, prompts, context, add_special_tokens=special)
    check_tokens(model, run, max(map(max, encoded)))
    lengths = [len(tokens) for tokens in encoded]
    batches = in_batches(lengths, samples, batch_size, group_size_of(model) or 1)
    notes = _what_batches_do(model, batches, lengths, max_new_tokens) if is_main() else []

    def write(number: int, streamer: BaseStreamer | None = None) -> list[Continuation]:
        rows = batches[number]
        written = draw(model, tokenizer, [encoded[row.prompt] for row in rows], sampling.of_batch(number), streamer)
        while notes:  # only now, as an error would make them pointless
            with tqdm.external_write_mode(file=sys.stderr):  # above the bar
                warn(notes.pop(0))
        return [
            Continuation(row.prompt, row.sample, prompts[row.prompt], text, count)
            for row, (text, count) in zip(rows, written, strict=True)
        ]

    if not is_main():
        while (number := broadcast(None)) is not None:  # the first process says which batch comes next
            write(number)
        return None
    if prompts_file is not None:
        out = out or prompts_file.with_name(f"{prompts_file.stem}.continued.jsonl")
        served = {"samples": samples, "batch_size": batch_size, "alone": alone, "experts": experts}
        served |= {} if dtype is None else {"dtype": dtype}
        settings = _settings_of(run, prompts, sampling, served)
        with owned_file(out), _leading(write) as led:
            return Generated(to_file(out, settings, batches, led, prompts), str(out))
    with _leading(write) as led:
        streamer = None if stream is None else Streamer(tokenizer, stream, ends_of(model, tokenizer))
        return Generated(_to_screen(batches, led, prompts, stream, streamer))


def _check_flags(texts: Sequence[str], prompts_file: Path | None, out: Path | None, stream: TextIO | None) -> None:
    """Raises ValueError for prompts that are not given, or twice, and where nothing can be written."""
    if (prompts_file is None) == (not texts):
        raise ValueError("give either --prompt, which may be repeated, or --prompts-file")
    if prompts_file is None and out is not None:
        raise ValueError("--out is for --prompts-file; continuations of --prompt are printed")
    if prompts_file is not None and out is None and _is_stream(prompts_file):
        raise ValueError(f"--prompts-file {prompts_file} is no regular file: name the file of continuations with --out")
    if stream is not None and not hasattr(stream, "write"):
        raise ValueError(f"stream takes what can be written to, such as sys.stdout, not {type(stream).__name__}")


def _settings_of(run: str, prompts: Sequence[str], sampling: Sampling, served: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of continuations depends on: it goes on only with the same."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    of = {"run": os.path.normpath(run), "prompts": digest, **served, "weights": weights_hash(run)}
    return of | sampling._asdict()  # the order counts, as all of it is hashed


def _what_batches_do(model: Any, batches: "Batches", lengths: Sequence[int], max_new_tokens: int | None) -> list[str]:
    """Notes on how many texts the context ends before they have the tokens asked for, and on who meets whom."""
    mixes = group_size_of(model) is not None
    context, widths, notes = context_of(model), [], []  # in tokens, of the rows of a sample before they are continued
    for batch in batches.of_a_sample:
        own = [lengths[index] for index in batch]
        widths += [max(own)] * len(own) if mixes else own
    cut = 0 if max_new_tokens is None else sum(width + max_new_tokens > context for width in widths)
    if cut:
        of = f"{cut * batches.samples} of {len(widths) * batches.samples} texts"
        notes.append(f"the context of {context} tokens ends {of} before {max_new_tokens} new tokens")
    if mixes and max(map(len, batches.of_a_sample)) > 1:
        hint = "; with --alone each is served by itself" if model.config.serves_alone else ""
        notes.append(f"prompts of a batch influence each other{hint}")
    return notes


@contextmanager
def _leading(write: Writer) -> Iterator[Writer]:
    """A writer that has the other processes of a sharded model write the same batch, and at the end lets them go."""
    if process_count() == 1:
        yield write
        return

    def led(number: int, *streamer: Any) -> list[Continuation]:
        broadcast(number)
        return write(number, *streamer)

    yield led
    broadcast(None)


def _is_stream(path: Path) -> bool:
    """Such as a pipe, beside which no file can be."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read_prompts(file: Path) -> list[str]:
    """Raises ValueError for a file that cannot be read as prompts, naming the line, and for one without any."""
    try:
        # Not at U+2028, as splitlines would.
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ValueError(f"--prompts-file {file}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"--prompts-file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file} is not UTF-8 at byte {error.start}") from None
    if lines == [""]:
        raise ValueError(f"--prompts-file {file} is empty")
    prompts = []
    for number, line in enumerate(lines, 1):
        if file.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"] if line.strip() else ""
            except (ValueError, KeyError, TypeError, RecursionError):
                line = None
        if not isinstance(line, str) or not line:
            what = "is empty; every line is a prompt" if line == "" else 'is no object with the text "prompt"'
            raise ValueError(f"--prompts-file {file}: line {number} {what}")
        prompts.append(line)
    return prompts


@dataclass(frozen=True)
class Batches(Sequence[list[Row]]):
    """Each batch of prompts' numbers, for every sample again; rows are made when a batch is asked for."""

    of_a_sample: list[list[int]]
    samples: int

    def __len__(self) -> int:
        return self.samples * len(self.of_a_sample)

    def __getitem__(self, number: Any) -> Any:
        sample, which = divmod(range(len(self))[number], len(self.of_a_sample))
        return [Row(index, sample) for index in self.of_a_sample[which]]


def in_batches(lengths: Sequence[int], samples: int, batch_size: int, group_size: int) -> Batches:
    """Every sample of every prompt once, prompts of similar lengths together, in complete groups but for the last."""
    size = -(-batch_size // group_size) * group_size
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return Batches([order[start : start + size] for start in range(0, len(order), size)], samples)


def _to_screen(
    batches: Batches, write: Writer, prompts: list[str], stream: TextIO | None, streamer: Streamer | None
) -> list[Continuation]:
    clock = time.perf_counter()
    if len(prompts) * batches.samples == 1 and stream is not None:
        print(prompts[0], end="", flush=True, file=stream)
        results = write(0, streamer)
    else:
        results = sorted(result for number in range(len(batches)) for result in write(number))
        if stream is not None:
            print(Generated(results), file=stream)
    say_speed(results, time.perf_counter() - clock)
    return results
