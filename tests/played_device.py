"""A device that Python plays, as no GPU is at hand where the tests run.

Tensors on it are wrappers of tensors of the CPU. An operation that takes one of each fails, as on a GPU, but for
copies, numbers and indices. `waits` collects the places of this library where a program would wait for a GPU. Importing
this changes torch for good: do it in a process of its own.
"""

import traceback
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

_device_constructors()  # remembers functions as they are before `tensor` is another
registration._setup_privateuseone_for_python_backend("played")
torch.played.get_amp_supported_dtype = lambda: [torch.bfloat16]  # pyright: ignore
DEVICE = torch.device("played:0")
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
WAITING = ("aten::_local_scalar_dense", "aten::equal", "aten::masked_select", "aten::nonzero")
WAITING += ("aten::_unique", "aten::_unique2", "aten::unique_dim")
WAITING += ("aten::unique_consecutive", "aten::unique_dim_consecutive")
waits: list[str] = []


class Played(Tensor):
    """A tensor of the device; `own` is the one of the CPU."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor):
        layout = {"strides": own.stride(), "storage_offset": own.storage_offset(), "dtype": own.dtype}
        wrapper = Tensor._make_wrapper_subclass(cls, own.size(), device=DEVICE, **layout)  # pyright: ignore
        wrapper.own = own
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # torch's makes it past `__torch_dispatch__`
        return torch.tensor(data, device=DEVICE, dtype=options.get("dtype", self.dtype))


class Playing(TorchDispatchMode):
    """Where tensors can be made on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name, (flat, structure) = function._schema.name, tree_flatten((args, kwargs))
    given = [value for value in flat if isinstance(value, Tensor)]
    played = any(isinstance(value, Played) for value in given)
    device = kwargs.get("device")
    there = played if device is None else torch.device(device).type == DEVICE.type
    if name == "aten::copy_":
        there = isinstance(args[0], Played)
    if not played and not there:
        return function(*args, **kwargs)
    left = [value for value in given if not isinstance(value, Played) and value.dim() > 0]
    if name in INDEXED:
        left = [value for value in left if value is args[0] or value.is_floating_point()]
    if played and left and name not in COPIES:
        raise RuntimeError(f"{name} takes a tensor {tuple(left[0].shape)} of the CPU and others of {DEVICE}")
    if _waits(name, args):
        stack = traceback.extract_stack()
        calls = [call for call in stack if "/mixture_of_tokens/" in call.filename]
        theirs = any("/transformers/masking_utils" in call.filename for call in stack)
        waits.extend(f"{call.filename}:{call.lineno}" for call in calls[-1:] if not theirs)
    flat = [value.own if isinstance(value, Played) else value for value in flat]
    inner, options = tree_unflatten(flat, structure)
    if device is not None and there:
        options["device"] = torch.device("cpu")
    found = function(*inner, **options)
    if not there:
        return found
    wrapped = tree_map_only(Tensor, Played, found)
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _waits(name: str, args: tuple) -> bool:
    """Whether the number of results, or a number of Python, is asked of the device."""
    if name not in INDEXED:
        return name in WAITING
    by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    filled = len(args) > 2 and args[2].numel() == 1  # with a number of Python's, which a GPU does by `masked_fill`
    return by_mask and not filled


def _making(real: Any) -> Any:
    def make(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != DEVICE.type:
            return real(data, *args, device=device, **options)
        return data if isinstance(data, Played) else Played(real(data, *args, **options))

    return make


torch.tensor, torch.as_tensor = _making(torch.tensor), _making(torch.as_tensor)


def moved(module: nn.Module) -> Any:
    """A module whose weights and buffers are on the device from now on; they share memory with what they were."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(Played(weight.detach()), requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Played(buffer.detach())
    return module
