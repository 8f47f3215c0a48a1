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
    parameters = [parameter.detach() for parameter in network.parameters()]
    # EMAModel would keep them on the host
    raw = [] if ema is None else [parameter.clone() for parameter in parameters]
    if ema is not None:
        ema.copy_to(network.parameters())
    try:
        yield network
    finally:
        if raw:
            torch._foreach_copy_(parameters, raw)
        network.train()
