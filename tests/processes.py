"""`mot` in this process, and in processes of its own for what has to be killed, signalled or run in several at once."""

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The server imports the library once, and every process is forked from it before it has threads.
context = multiprocessing.get_context("forkserver")
COMMANDS = ("training.train", "training.sweep", "training.compare", "generation.generate", "conversion.transition")
context.set_forkserver_preload([f"mixture_of_tokens.{module}" for module in ("commands.cli", *COMMANDS)])

# Processes, and the flags of a layout.
LAYOUTS = {
    "one": (1, []),
    "copies": (2, []),
    "shards": (2, ["--shard", "2"]),
    "experts": (2, ["--shard", "2", "--expert-parallel", "2"]),
    "halves": (4, ["--shard", "4", "--expert-parallel", "2"]),
    "all": (4, ["--shard", "2", "--replicate", "2", "--expert-parallel", "2"]),
}


def _run(function, words: tuple, environment: dict[str, str], log: Path) -> None:
    import torch

    gc.freeze()  # as in conftest.py, and the server's memory stays shared
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        None, force=True
    )  # a shell's: workers would start, and import, a server of their own
    os.environ.update(environment)
    with log.open("a") as file:
        for stream in (1, 2):  # so that it has the traceback too, and what C++ says
            os.dup2(file.fileno(), stream)
    faulthandler.enable()
    function(*words)


def start(function, *words, log: Path, **environment: object):
    """A started process that calls `function`; its output is appended to `log`."""
    cache = {"MIXTURE_OF_TOKENS_CACHE": os.environ["MIXTURE_OF_TOKENS_CACHE"]}
    environment = cache | {name: str(value) for name, value in environment.items()}
    process = context.Process(target=_run, args=(function, words, environment, log))
    process.start()
    return process


def finish(process, seconds: float = 120) -> int | None:
    """The exit status; negative for a signal."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        sys.exit(f"no end after {seconds} s")
    return process.exitcode


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def in_processes(function, words: Sequence, count: int, log: Path, exits: int | tuple[int, ...] = 0) -> None:
    """Calls `function` in so many processes, as torchrun would; `exits`: the exit status of all, or of each."""
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)] if count > 1 else [{}]
    processes = [start(function, *words, log=log, **(world if count > 1 else {}), **rank) for rank in ranks]
    expected = list(exits if isinstance(exits, tuple) else [exits] * count)
    ended = [finish(process) for process in processes]
    assert ended == expected, f"{ended}:\n{log.read_text()}"


def function(command: str) -> Callable[..., Any]:
    """What a command of `mot` calls."""
    name = command.replace("-", "_")
    return getattr(importlib.import_module(f"mixture_of_tokens.commands.{name}"), name)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Of its metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mot(*words: object) -> None:
    from mixture_of_tokens.commands import (
        cli,  # in this function, so that a process that is forked has it imported before
    )

    cli.main([str(word) for word in words])


def mot_on_a_full_disk(limit: int, *words: object) -> None:
    """As far as a process can tell, the disk takes no file above `limit` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    mot(*words)


ELSEWHERE = """
import contextlib, io, json, sys
sys.modules["mixture_of_tokens"] = None
import torch, transformers
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {})
    except Exception as raised:
        error = repr(raised)
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""
Python = Callable[..., str]


@contextmanager
def another_python(**environment: str) -> Iterator[Python]:
    """A process that runs programs as `in_plain_transformers` does, one after the other; it ends with its input."""
    words, pipes = [sys.executable, "-c", ELSEWHERE], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True, env=os.environ | environment) as process:

        def run(code: str, *words: str) -> str:
            print(json.dumps([code, *words]), file=process.stdin, flush=True)
            printed, error = json.loads(process.stdout.readline())
            if error is not None:
                raise ValueError(f"plain transformers cannot load what was written: {error}")
            return printed

        yield run
