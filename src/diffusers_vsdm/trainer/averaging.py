"""Networks with their averaged weights, for a while."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.training_utils import EMAModel

from .sharding import is_sharded, whole_network


@contextlib.contextmanager
def averaged(network: torch.nn.Module, ema: EMAModel | None) -> Iterator[torch.nn.Module]:
    """The network in evaluation, with its averaged weights if there are any; afterwards it is as it was.

    One that is split over the processes stays in training, and what is yielded is a copy, whole in each of them.
    """
    if is_sharded(network):
        yield whole_network(network, ema)
        return
    network.eval()
    _exchange(network, ema)
    try:
        yield network
    finally:
        _exchange(network, ema)
        network.train()


def _exchange(network: torch.nn.Module, ema: EMAModel | None) -> None:
    """Weights and averages change places, without a copy of either."""
    if ema is not None:
        for parameter, mean in zip(network.parameters(), ema.shadow_params, strict=True):
            parameter.data, mean.data = mean.data, parameter.data
