"""Commands that are killed at any moment, and given again: what they make is what they make where nothing happens."""

import hashlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from processes import finish, mot, start

TRAINING = ["--batch-size", 32, "--device", "cpu", "--training.save_steps", 1, "--training.logging_steps", 1]
KILLS = 6


class Command(NamedTuple):
    words: Callable[[Path, dict[str, Path], Path], list]  # for an output, finished runs and a folder of texts
    again: list  # added where it goes on
    made: str  # the files, below the output, that have to be equal


COMMANDS = {
    "train": Command(
        lambda out, runs, texts: ["train", "MoT-Nano/4E", "--steps", 12, *TRAINING, "--data", texts, "--out", out],
        ["--resume"],
        "model/*.safetensors",
    ),
    "parts": Command(
        lambda out, runs, texts: [
            *("train", "Transformer-Nano", "--steps", 24, *TRAINING, "--data", texts, "--out", out),
            *("--part-bytes", sum(file.stat().st_size for file in texts.iterdir()) // 4),
        ],
        ["--resume"],
        "model/*.safetensors",
    ),
    "compare": Command(
        lambda out, runs, texts: [
            *("compare", "MoT-Nano/4E", "Transformer-Nano", "--steps", 6, "--seeds", 1, *TRAINING),
            *("--data", texts, "--out", out),
        ],
        [],
        "*/model/*.safetensors",
    ),
    "transition": Command(
        lambda out, runs, texts: [
            *("transition", runs["MoT-Nano/4E/2"], "--steps", 6, "--distil-steps", 5, "--device", "cpu", "--out", out)
        ],
        ["--resume"],
        "model/*.safetensors",
    ),
    "export": Command(
        lambda out, runs, texts: ["export", runs["MoT-Nano/4E/2"], out, "--distil-steps", 5, "--device", "cpu"],
        ["--force"],
        "*.safetensors",
    ),
    "prepare": Command(lambda out, runs, texts: ["prepare", "MoT-Nano/4E", "--data", texts], [], "tokens-*/*"),
}


def made_by(command: Command, out: Path) -> dict[str, str]:
    """Hashes of what a command has made."""
    files = [file for file in out.glob(command.made) if file.name != "manifest.json"]
    assert files
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_kills(name: str, count: int, tiny_runs: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """A kill comes at any moment of the time that the command takes undisturbed."""
    command, choose, log = COMMANDS[name], random.Random(name), tmp_path / "log"
    cache = tiny_runs["TC-Nano/4E"].parent / "cache"

    def begin(out: Path, *more: object):
        place = {"MIXTURE_OF_TOKENS_CACHE": out if name == "prepare" else cache}
        return start(mot, *command.words(out, tiny_runs, texts), *more, log=log, **place)

    finish(start(mot, "--version", log=log))  # what is imported once is no part of a command's time
    begun = time.monotonic()
    assert finish(begin(tmp_path / "whole")) == 0, log.read_text()
    takes, out, killed = time.monotonic() - begun, tmp_path / "out", 0
    for number in range(count):
        process = begin(out, *(command.again if number else []))
        process.join(choose.uniform(0.1, 1) * takes)
        process.kill()
        killed += finish(process) == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    assert killed
    assert finish(begin(out, *command.again)) == 0, log.read_text()
    assert made_by(command, out) == made_by(command, tmp_path / "whole")
    assert not list(out.rglob("*.partial"))
    shutil.rmtree(out)


def test_a_killed_preparation_is_made_again(tiny_runs, small_corpus, tmp_path):
    check_kills("prepare", 3, tiny_runs, small_corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_six_times_ends_as_if_nothing_had_been(name, tiny_runs, small_corpus, tmp_path):
    check_kills(name, KILLS, tiny_runs, small_corpus, tmp_path)
