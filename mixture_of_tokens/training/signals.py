"""What SIGTERM and ^C do to a training."""

import os
import re
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mixture_of_tokens.utils.process import TORCHRUN, answered, end_with_parent

ALWAYS = 30  # seconds of torchrun
FLAG = re.compile("--shutdown[-_]timeout(=|$)")  # what sets others since torch 2.12


def seconds_after_signal() -> int | None:
    """For which torchrun waits for its processes before it kills them; None in a process that it has not started."""
    if TORCHRUN not in os.environ:
        return None
    if torch.__version__ < "2.12":
        return ALWAYS
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        words = []
    given = [word.partition("=")[2] or after for word, after in pairwise(words) if FLAG.match(word)]
    given += [
        os.environ[name] for name in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT") if name in os.environ
    ]
    return int(given[0]) if given and given[0].isdecimal() else ALWAYS


class StopOnSignal(TrainerCallback):
    """SIGTERM or a first ^C ends the run after the current step, with a checkpoint; `received` is its number.

    The text of the next step is waited for at the end of a step, where a signal can break off the wait.

    Args:
        wait: called with the number of a step, waits for its text.
    """

    def __init__(self, wait: Callable[[int], None]):
        self.received: int | None = None
        self._wait, self._waiting = wait, False
        self._hosts: Any = None  # all processes, by way of the CPU: no step waits for a device

    def installed(self) -> AbstractContextManager[None]:
        """The handlers, until the end of the block."""
        return answered(self._receive, signal.SIGTERM, signal.SIGINT)

    def _receive(self, number: int, frame) -> None:
        waiting, self._waiting = self._waiting, False
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second ^C does not wait
        if waiting:
            raise KeyboardInterrupt(number)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            limit = timedelta(seconds=args.ddp_timeout)
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=limit)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hosts is not None:
            torch.distributed.destroy_process_group(self._hosts)

    def on_step_end(self, args, state, control, **kwargs):
        with suppress(KeyboardInterrupt, ValueError, OSError):  # text at fault is told when the next step begins
            self._waiting = self.received is None
            try:
                if self._waiting:
                    self._wait(state.global_step)
            finally:
                self._waiting = False
        if self._hosts is not None:  # all processes stop after the same step
            received = torch.tensor(self.received or 0)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._hosts)
            self.received = int(received) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True


def begin_worker(ending: Any, begin: Callable[[int], None] | None, number: int) -> None:
    """In a new worker of the loader: ignore ^C and SIGTERM, which the main process answers.

    It needs its workers until it has saved. Once `ending` is set, SIGTERM ends a worker: the interpreter sends it at
    its end, and waits. A worker also ends with a main process that is killed; torch's own check watches its parent,
    which may be a fork server.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)
    end_with_parent()
    if begin is not None:
        begin(number)
