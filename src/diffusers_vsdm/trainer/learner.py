"""A network with its optimizer and its averaged weights, as the tensors and numbers of a checkpoint, and back."""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor

from .checkpoint import inside
from .sharding import gathered, laid_out_like, split_like


def learner_state(
    network: ModelMixin, optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors, and numbers that JSON takes; called in all processes where the network is split over them."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    moments = optimizer.state_dict()
    for i, state in moments["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
    numbers = {"param_groups": moments["param_groups"], "ema": {}}
    if ema is not None:
        averaged = ema.state_dict()
        tensors |= {f"ema.{i}": tensor for i, tensor in enumerate(averaged.pop("shadow_params"))}
        numbers["ema"] = averaged
    return {name: gathered(tensor) for name, tensor in tensors.items()}, numbers


def load_learner(
    network: ModelMixin,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    """Go on from a [`learner_state`]."""
    known = network.state_dict()
    weights = inside(tensors, "network")
    network.load_state_dict({name: split_like(tensor, known[name]) for name, tensor in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = inside(tensors, "optimizer")
    state = {
        i: {name: laid_out_like(tensor, parameter) for name, tensor in found.items()}
        for i, parameter in enumerate(parameters)
        if (found := inside(moments, str(i)))
    }
    optimizer.load_state_dict({"state": state, "param_groups": numbers["param_groups"]})
    if ema is not None:
        shadow = [laid_out_like(tensors[f"ema.{i}"].to(own.device), own) for i, own in enumerate(ema.shadow_params)]
        ema.load_state_dict(numbers["ema"] | {"shadow_params": shadow})
