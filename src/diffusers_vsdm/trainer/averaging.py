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
    if ema is None:
        yield network
    else:
        parameters = [parameter.detach() for parameter in network.parameters()]
        raw = [parameter.clone() for parameter in parameters]  # EMAModel would keep them on the host
        ema.copy_to(network.parameters())
        yield network
        torch._foreach_copy_(parameters, raw)
    network.train()
