"""Continuations of prompts, and the file that a stopped command goes on with."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens.runs.typed import Record
from mixture_of_tokens.utils.files import disk_errors, write_text
from mixture_of_tokens.utils.progress import progress_bar, say


class Row(NamedTuple):
    """A row of a batch: the number of its prompt and of the sample."""

    prompt: int
    sample: int


@dataclass(frozen=True, order=True)
class Continuation(Record):
    """What was written after a prompt: the numbers of the prompt and of the sample, the texts, how many tokens."""

    index: int
    sample: int
    prompt: str
    text: str
    tokens: int

    def line(self, **more: str) -> str:
        return json.dumps(asdict(self) | more, ensure_ascii=False)


# Makes the continuations of a batch by its number, streaming them if there is a streamer.
Writer = Callable[..., list[Continuation]]


def to_file(
    out: Path, settings: dict[str, Any], batches: Sequence[list[Row]], write: Writer, prompts: list[str]
) -> list[Continuation]:
    """Write OUT.unfinished batch by batch, the settings first; when it is complete, OUT in the order of the prompts.

    Each line of OUT has a hash of the settings as `settings`, by which it is known again.
    """
    partial = out.with_name(f"{out.name}.unfinished")
    samples = batches[-1][0].sample + 1
    own = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if out.exists():
        if (finished := _finished(out, own, samples, prompts)) is None:
            why = "exists already, and is not what this command writes, by flags, prompts and model"
            raise ValueError(f"{out} {why}; name another with --out, or remove it")
        say(f"{out} is finished already")
        return finished
    done = _resumed(partial, settings, samples, prompts)
    new: list[Continuation] = []
    clock, total = time.perf_counter(), len(prompts) * samples
    with (
        disk_errors(out),
        partial.open("a", encoding="utf-8") as file,
        progress_bar("generate", total=total, initial=len(done), unit="text") as bar,
    ):
        for number, batch in enumerate(batches):
            if all(row in done for row in batch):
                continue
            for result in write(number):
                row = Row(result.index, result.sample)
                if row not in done:
                    file.write(result.line() + "\n")
                    new.append(result)
                    done[row] = result
                    bar.update()
            file.flush()
    write_text(out, "".join(done[row].line(settings=own) + "\n" for row in sorted(done)))
    partial.unlink()
    if new:
        say_speed(new, time.perf_counter() - clock)
    say(summary_of(len(done), out))
    return [done[row] for row in sorted(done)]


def summary_of(count: int, out: str | Path) -> str:
    return f"{'1 continuation is' if count == 1 else f'{count} continuations are'} in {out}"


def _finished(out: Path, settings: str, samples: int, prompts: list[str]) -> list[Continuation] | None:
    """What is in a file, if it has all samples of every prompt in order, written with these settings."""
    try:
        lines = out.read_bytes().removesuffix(b"\n").split(b"\n")
        found = [_continuation(line, number, out, prompts, settings) for number, line in enumerate(lines, 1)]
    except (ValueError, OSError, AttributeError, KeyError, TypeError):
        return None
    in_order = all((each.index, each.sample) == divmod(number, samples) for number, each in enumerate(found))
    return found if len(found) == len(prompts) * samples and in_order else None


def _continuation(
    line: bytes, number: int, file: Path, prompts: list[str], settings: str | None = None
) -> Continuation:
    """Raises ValueError, naming file and line, for what is no continuation of one of the prompts."""
    try:
        fields = json.loads(line)
        if settings is not None and fields.pop("settings") != settings:
            raise ValueError("it was written with other settings")
        found = Continuation.of(fields, file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {number}, is damaged: {error}") from None
    if not 0 <= found.index < len(prompts) or prompts[found.index] != found.prompt:
        raise ValueError(f"{file}, line {number}, is damaged: it continues none of the prompts")
    return found


def _resumed(partial: Path, settings: dict[str, Any], samples: int, prompts: list[str]) -> dict[Row, Continuation]:
    """The continuations that an interrupted command has written; an incomplete last line is cut off.

    Raises ValueError if it had other settings, and, naming the line, if it is damaged.
    """
    lines = b""
    if partial.exists():
        lines = b"".join(partial.read_bytes().rpartition(b"\n")[:2])
    if not lines:
        write_text(partial, json.dumps(settings, ensure_ascii=False) + "\n")
        return {}
    first, *written = lines.removesuffix(b"\n").split(b"\n")
    try:
        before = json.loads(first)
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{partial}, line 1, is damaged: it holds no settings; remove the file to begin again")
    for key, value in settings.items():
        if before.get(key) != value:
            raise ValueError(
                f"{partial} was begun with {key.replace('_', '-')} {before.get(key)}, now it is {value}; "
                "give the same flags and prompts, name another --out, or remove it"
            )
    found = [_continuation(line, number, partial, prompts) for number, line in enumerate(written, 2)]
    done = {Row(each.index, each.sample): each for each in found}
    if not all(0 <= row.sample < samples for row in done):
        raise ValueError(f"{partial} is damaged: it has a sample that was not asked for; remove it to begin again")
    write_text(partial, lines.decode())
    say(f"Going on from {partial}")
    return done


def say_speed(results: list[Continuation], seconds: float) -> None:
    tokens = sum(result.tokens for result in results)
    say(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
