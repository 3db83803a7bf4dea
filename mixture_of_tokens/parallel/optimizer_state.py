"""An optimizer's state in a checkpoint: tensors in safetensors, of each process its part, and the rest as JSON.

No file of it can run code. Earlier versions wrote torch.distributed.checkpoint's own format, whose index is a pickle:
that is read with a list of the classes that such an index holds, and refused where it names anything else.
"""

import io
import json
import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard

from mixture_of_tokens.utils.formatting import unreadable
from mixture_of_tokens.utils.process import is_main

OPTIMIZER = "optimizer"  # the folder of its state in a checkpoint
INDEX = "optimizer.json"  # sizes of all tensors, by which a missing part is noticed, and what is no tensor
PICKLED_INDEX = ".metadata"  # of earlier versions
PART_BYTES = 2**28  # of tensors in a file, all of which torch holds a second time while it writes them
# What readers raise of files that no training has written.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, EOFError)
UNREADABLE += (pickle.UnpicklingError, SafetensorError)
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Write its state by the names of weights, each process its part. Every process calls it.

    Raises, in all of them, what one raises that cannot write: OSError, or torch's RuntimeError of a full disk; and
    ValueError for state that neither safetensors nor JSON holds.
    """
    folder, (tensors, others) = checkpoint / OPTIMIZER, _parts(_contiguous(_state(model, optimizer)))
    sizes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    try:
        index = json.dumps({"sizes": sizes, "values": others})
    except TypeError as error:
        raise ValueError(f"the state of {type(optimizer).__name__} cannot be saved: {error}") from None
    try:
        with _one_process_will_do():
            writer = HuggingFaceStorageWriter(str(folder), _numbers_of_files(tensors), save_distributed=True)
            save(tensors, storage_writer=writer)
    except CheckpointException as failed:
        raise _first_of(failed) from None
    if is_main():
        (folder / INDEX).write_text(index)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Read what `save_optimizer` wrote, in this placement or another. Every process calls it.

    Raises OSError, naming the folder, for what is no state of this optimizer.
    """
    folder, own = checkpoint / OPTIMIZER, _state(model, optimizer)
    state = _contiguous(own)
    tensors, others = _parts(state)
    try:
        with _one_process_will_do():
            if (folder / PICKLED_INDEX).exists():
                reader, planner, read = _PickledReader(folder), _PickledPlanner(), {"optimizer": state}
            else:
                written = json.loads((folder / INDEX).read_text())["values"]
                state |= {name: _as(value, written[name]) for name, value in others.items()}
                reader, planner, read = HuggingFaceStorageReader(str(folder)), None, tensors
            reader.read_metadata()  # or why not: `load` would log that, with a traceback, and look for another
            load(read, storage_reader=reader, planner=planner)
    except (*UNREADABLE, CheckpointException) as error:
        why = _first_of(error) if isinstance(error, CheckpointException) else error
        raise OSError(f"{folder} cannot be read: {unreadable(why)}") from None
    set_optimizer_state_dict(
        model, optimizer, {name: _placed_as(own[name], state[name]) for name in own}, options=BY_NAME
    )


def check_optimizer(checkpoint: Path) -> None:
    """Raises OSError where parts are missing, as when machines write to disks of their own."""
    folder = checkpoint / OPTIMIZER
    sizes = json.loads((folder / INDEX).read_text())["sizes"]
    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, size in sizes.items():
        chunks = found[name].chunks if name in found else []
        if sum(chunk.sizes.numel() for chunk in chunks) != math.prod(size):
            what = "all processes need the run directory on a file system that they share"
            raise OSError(f"{folder} lacks parts of {name}, which another process has written: {what}")


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By names that are the same in any layout, such as state.model.norm.weight.exp_avg and
    param_groups.model.norm.weight.lr."""
    return get_optimizer_state_dict(model, optimizer, options=BY_NAME)


def _parts(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and what is none."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _contiguous(state: dict[str, Any]) -> dict[str, Any]:
    """With shards of successive rows: torch takes every shard for one block, which not all are where experts are
    divided too."""
    return {name: _in_blocks(value) if isinstance(value, DTensor) else value for name, value in state.items()}


def _in_blocks(tensor: DTensor) -> DTensor:
    dims = [getattr(placement, "dim", None) for placement in tensor.placements]  # of a strided shard too
    placements = [p if dim is None else Shard(dim) for p, dim in zip(tensor.placements, dims, strict=True)]
    return tensor.redistribute(placements=placements)


def _placed_as(own: Any, value: Any) -> Any:
    return value.redistribute(placements=own.placements) if isinstance(own, DTensor) else value


def _numbers_of_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + written // PART_BYTES
        written += tensor.numel() * tensor.element_size()
    return numbers


def _as(own: Any, written: Any) -> Any:
    """A value of the file as what the optimizer has in its place. Raises TypeError for what cannot stand there."""
    if isinstance(own, list | tuple) and isinstance(written, list):
        return type(own)(_as(*pair) for pair in zip(own, written, strict=True))
    if _kind(own) != _kind(written):
        raise TypeError(f"{written!r} stands in the place of {own!r}")
    return written


def _kind(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return "flag"
    return "number" if isinstance(value, int | float) else type(value)


@contextmanager
def _one_process_will_do() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_of(failed: CheckpointException) -> BaseException:
    return next(iter(failed.failures.values()))[0]


# All that the index of an optimizer's state names, beside types of numbers.
_NAMED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        filesystem._StorageInfo,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        torch.Size,
    )
}
_NAMED["torch.serialization", "_get_layout"] = {"torch.strided": torch.strided}.__getitem__
for _module in ("pathlib", "pathlib._local"):  # of the folder in which it was written, which nothing reads
    _NAMED[_module, "PosixPath"] = PurePosixPath


class _Index(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (named := _NAMED.get((module_name, global_name))) is not None:
            return named
        if module_name == "torch" and isinstance(dtype := vars(torch).get(global_name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{PICKLED_INDEX} names {module_name}.{global_name}, which no such file does")


class _PickledReader(filesystem.FileSystemReader):
    """Its tensors are read by torch with `weights_only`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / PICKLED_INDEX).open("rb") as file:
            index = _Index(file).load()
        if not isinstance(index, metadata.Metadata):
            raise pickle.UnpicklingError(f"{PICKLED_INDEX} is no index")
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class _PickledPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """What is no tensor: torch would load it with all that a pickle can do, so it gets what we have loaded."""
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
