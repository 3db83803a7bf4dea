"""What happens around the steps of a training: the clock, metrics.jsonl, the temperature, signals, gradients."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from mixture_of_tokens.disk import disk_errors, flush, write_text
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.runs.records import MetricsRow, row_of
from mixture_of_tokens.sparse import SigmoidChoice

# What Trainer logs, by its name in a row of metrics.jsonl.
OF_LOGS = {name: name for name in ("eval_loss", "learning_rate", "grad_norm", "aux_loss", "data_wait")}
OF_LOGS |= {"loss": "train_loss"}


class BalanceCallback(TrainerCallback):
    """Balances routings without a balancing loss after each step, in any Trainer."""

    def __init__(self, model: MixtureOfTokensForCausalLM):
        self.model = model

    def on_substep_end(self, args, state, control, **kwargs):
        for module in self.model.modules():
            if isinstance(module, SigmoidChoice) and module.load_E is not None:
                module.load_E = module.load_E.clone()  # a graph of CUDA writes the next micro-batch's over it

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.model.balance()


class Clock:
    """Seconds of training."""

    def __init__(self):
        self.before, self._since = 0.0, None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None and torch.accelerator.is_available():  # steps that are still to be computed
            torch.accelerator.synchronize()
        self.before, self._since = self.seconds, None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()


class RunLog(TrainerCallback):
    """`metrics.jsonl`, a row for every logged step, and the progress bar: loss, tokens a second, time left."""

    def __init__(self, path: Path, tokens_per_step: int, clock: Clock, first_step: int = 0):
        self.path, self.tokens_per_step, self.clock, self.first_step = path, tokens_per_step, clock, first_step
        self.row: MetricsRow | None = None
        self.bar: tqdm | None = None

    def forget_after(self, step: int) -> None:
        """Drop the rows that a resumed run writes again, and an incomplete last one.

        Raises ValueError, naming file and line, for a damaged row, which cannot be written again.
        """
        kept = []
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
                if not line.endswith(b"\n") or row_of(line, number, self.path).step > step:
                    break
                kept.append(line.decode())
        write_text(self.path, "".join(kept))

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed run may have another save_steps
        self.clock.start()  # not earlier: a resumed run loads its checkpoint first
        if state.is_world_process_zero:
            every = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines than a screen
            name, first = self.path.parent.name, state.global_step
            self.bar = tqdm(
                desc=name, total=state.max_steps, initial=first, unit="step", dynamic_ncols=True, mininterval=every
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if self.bar is None or not any(name in logs for name in ("loss", "eval_loss")):
            return
        step = self.first_step + state.global_step
        if self.row is not None and self.row.step != step:
            self.write()
        seconds, tokens = self.clock.seconds, step * self.tokens_per_step
        spent = {"tokens": tokens, "seconds": round(seconds, 3)}
        spent["tokens_per_second"] = round(tokens / seconds) if tokens else 0
        before = MetricsRow(step=step, **spent) if self.row is None else self.row
        measured = {OF_LOGS[name]: value for name, value in logs.items() if name in OF_LOGS}
        layers = before.layers or {}
        for name, value in logs.items():  # layer/2/mixture_entropy
            if name.startswith("layer/"):
                _, layer, what = name.split("/")
                layers.setdefault(layer, {})[what] = value
        self.row = replace(before, **spent, **measured, layers=layers or None)
        losses = {"train_loss": self.row.train_loss, "eval_loss": self.row.eval_loss}
        shown = {name: f"{loss:.3f}" for name, loss in losses.items() if loss is not None}
        self.bar.set_postfix(shown | {"tokens/s": self.row.tokens_per_second}, refresh=False)

    def close(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            bar.close()
            self.save()

    def save(self) -> None:
        """All rows on the disk, before there is a checkpoint that goes on after them, or a run.json."""
        self.write()
        with disk_errors(self.path):
            flush(self.path)

    def write(self) -> None:
        row, self.row = self.row, None  # once: a full disk would raise again when all is closed
        if row is not None:
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(row.line())


class AnnealTemperature(TrainerCallback):
    """Router temperature from `start` to `end`, geometrically; a function of the step alone."""

    def __init__(self, model: MixtureOfTokensForCausalLM, end: float):
        self.model, self.start, self.end = model, model.config.router_temperature, end

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed, perhaps after the last step: no checkpoint holds the temperature
            self._set(state.global_step - 1, state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self._set(state.global_step, state.max_steps)

    def _set(self, step: int, steps: int) -> None:
        progress = step / max(1, steps - 1)
        self.model.set_router_temperature(self.start * (self.end / self.start) ** progress)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Until the end of the block SIGTERM raises KeyboardInterrupt, as ^C does, but with its number."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def told_by_the_main_thread() -> Iterator[None]:
    """TensorBoard's thread prints a traceback of what its next call raises, such as of a full disk: not that."""
    before = threading.excepthook

    def told(said: threading.ExceptHookArgs) -> None:
        if type(said.thread).__name__ != "_AsyncWriterThread":
            before(said)

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = before


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

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The handlers, until the end of the block."""
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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


@contextmanager
def writes_events(trainer: Trainer, directory: Path, step: int) -> Iterator[None]:
    """TensorBoard's events in one directory of a run, however often it is resumed at a step: points that are written
    again replace the earlier ones."""
    if trainer.pop_callback(TensorBoardCallback) is None or not trainer.is_world_process_zero():
        yield
        return
    writer = SummaryWriter(str(directory), purge_step=step + 1)
    trainer.add_callback(TensorBoardCallback(writer))
    try:
        yield
    finally:
        with suppress(OSError):  # such as of a full disk, which may be what was raised
            writer.close()  # or its thread goes on after a training that fails
