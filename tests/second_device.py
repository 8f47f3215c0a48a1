"""A second device for machines that have none: it lies in the CPU's memory, and is as strict as a GPU.

Its tensors meet those of the CPU in copies alone, its generators draw on it alone, and like Apple's it has no float64.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only


NAME = "second"
DEVICE = torch.device("privateuseone", 0)  # as it is called until it is registered
ATEN = torch.ops.aten
COPIES = (ATEN.copy_.default, ATEN._to_copy.default)
MIXED = (*COPIES, ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default)
WIDE = (torch.float64, torch.complex128)


class _Backend:
    """What PyTorch, Accelerate and Diffusers ask of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None: ...

    def empty_cache(self) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


class DeviceTensor(torch.Tensor):
    """A tensor of the device; its numbers are in `held`."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype in WIDE:
            raise TypeError(f"There is no {held.dtype} on this device.")
        like = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **like)

    def __init__(self, held):
        self.held = held

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({self.held})"

    def __reduce_ex__(self, protocol):
        return DeviceTensor, (self.held,)

    def tolist(self):
        return self.held.tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def numpy(self, *, force=False):
        raise TypeError("Copy the tensor to the CPU first.")

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return DeviceTensor(parts["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _is_here(device) -> bool:
    return torch.device(device).type == DEVICE.type


def _run(func, args, kwargs):
    """An operation on the numbers, if all of its tensors lie on one device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    if here and func not in MIXED and any(t.ndim and not isinstance(t, DeviceTensor) for t in tensors):
        raise RuntimeError(f"{func}: expected all tensors on one device, but found two.")
    if kwargs.get("device") is not None:
        here, kwargs = _is_here(kwargs["device"]), kwargs | {"device": "cpu"}
    held_args, held_kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if func is ATEN.copy_.default:
        return args[0]
    if not here or func is ATEN._local_scalar_dense.default:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, DeviceTensor, out))


class _Operations(TorchDispatchMode):
    """Those that make a tensor of nothing are not asked of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        makes = kwargs.get("device") is not None and _is_here(kwargs["device"])
        takes = any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves((args, kwargs)))
        return _run(func, args, kwargs) if makes or takes else func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Numbers of Python are copied from the CPU, and generators must be of the device that they draw on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if func in (torch.tensor, torch.as_tensor) and device is not None and _is_here(device):
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        if generator is not None:
            like = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
            place = device or ("cpu" if like is None else like.device)
            if _is_here(place) != _is_here(generator.device):
                raise RuntimeError(f"{func}: a generator of {generator.device} draws on {place}.")
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """The CPU's numbers, also of the device."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.place = torch.device(device)
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.place


def register() -> None:
    """Tell PyTorch of the device, once in a process and before the first backward pass."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """The device, as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch, _Functions(), _Operations():
        patch.setattr(torch, "Generator", _Generator)
        yield DEVICE
