"""Networks that Accelerate splits over the processes, FSDP2's: whole tensors and whole networks, and back.

What gathers is called in all processes.
"""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: torch.nn.Module) -> bool:
    """Whether the processes hold parts of its parameters."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """The whole of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor as the parts that the processes hold of `model`."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor as `model` lies in memory, and as its parts; fused optimizers go by memory, not by index."""
    if isinstance(model, DTensor) or tensor.shape != model.shape:
        return split_like(tensor, model)
    return torch.empty_like(model, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


def whole_network(network: ModelMixin, ema: EMAModel | None) -> ModelMixin:
    """A copy in evaluation that is not split, with the averaged weights if there are any."""
    state = {name: gathered(tensor) for name, tensor in network.state_dict().items()}
    if ema is not None:
        names = [name for name, _ in network.named_parameters()]
        state |= {name: gathered(tensor) for name, tensor in zip(names, ema.shadow_params, strict=True)}
    plain: Any = next(c for c in type(network).__mro__ if issubclass(c, ModelMixin) and not issubclass(c, FSDPModule))
    copy = plain.from_config({name: value for name, value in network.config.items() if not name.startswith("_")})
    copy.load_state_dict(state)
    return copy.to(network.device).eval()
