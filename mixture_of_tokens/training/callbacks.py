"""What happens around the steps of a training: the clock and metrics.jsonl."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from mixture_of_tokens.runs.records import MetricsRow, row_of
from mixture_of_tokens.utils.files import disk_errors, flush, write_text
from mixture_of_tokens.utils.progress import progress_bar

# What Trainer logs, by its name in a row of metrics.jsonl.
OF_LOGS = {name: name for name in ("eval_loss", "learning_rate", "grad_norm", "aux_loss", "data_wait")}
OF_LOGS |= {"loss": "train_loss"}


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
        self.written = 0  # rows
        self.bar: tqdm | None = None

    def forget_after(self, step: int, rows: int = 0) -> None:
        """Drop the rows that a resumed run writes again, and an incomplete last one; `rows` must be left.

        Raises ValueError, naming file and line, for a damaged row, and for missing ones: none can be written again.
        """
        kept = []
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
                if not line.endswith(b"\n") or row_of(line, number, self.path).step > step:
                    break
                kept.append(line.decode())
        if len(kept) < rows:
            what = f"{self.path} has {len(kept)} of the {rows} rows up to step {step}"
            raise ValueError(f"{what}: put it back, or name another directory with --out")
        self.written = len(kept)
        write_text(self.path, "".join(kept))

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed run may have another save_steps
        self.clock.start()  # not earlier: a resumed run loads its checkpoint first
        if state.is_world_process_zero:
            every = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines than a screen
            name, first = self.path.parent.name, state.global_step
            self.bar = progress_bar(name, total=state.max_steps, initial=first, unit="step", mininterval=every)

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
            self.written += 1
