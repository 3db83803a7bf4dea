"""TensorBoard's events of a run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback


@contextmanager
def writes_events(trainer: Trainer, directory: Path, step: int) -> Iterator[None]:
    """TensorBoard's events in one directory of a run, however often it is resumed at a step: points that are written
    again replace the earlier ones."""
    if trainer.pop_callback(TensorBoardCallback) is None or not trainer.is_world_process_zero():
        yield
        return
    writer = SummaryWriter(str(directory), purge_step=step + 1)
    trainer.add_callback(TensorBoardCallback(writer))
    with _without_tracebacks():
        try:
            yield
        finally:
            with suppress(OSError):  # such as of a full disk, which may be what was raised
                writer.close()  # or its thread goes on after a training that fails


@contextmanager
def _without_tracebacks() -> Iterator[None]:
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
