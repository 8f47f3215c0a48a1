r"""The scales a and s of the forward process at training times, on a device and in a type."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import process
from ..discrete import DiscreteProcess


FEW_RATES = 64  # so many are looked up in a table at every training time


def log_sigma(rates: DiscreteProcess, reduce: Callable[[Tensor], Tensor]) -> np.ndarray:
    """log(s / a) at every training time, `(N,)`, at the log-SNR that `reduce` makes of all dimensions'."""
    at = (rates.at(torch.tensor([k]))[0] for k in range(len(rates)))
    return np.array([-0.5 * float(reduce(process.log_snr(rates.lam, g))) for g in at])


class Marginals:
    r"""The scales of $x_t = a_t x_0 + s_t \epsilon$ for samples of one type on one device.

    Args:
        rates: The process, in float64 on the CPU.
        like: A sample `(batch, *event_shape)`, for number of dimensions and device.
        dtype: Of the scales. They are computed in float32 at least.
    """

    def __init__(self, rates: DiscreteProcess, like: Tensor, dtype: torch.dtype):
        self._ones = [1] * (like.ndim - 1 - rates.lam.ndim)
        self._dtype = dtype
        # no table of scales for many rates: it would be N times as large as a sample. Rates that vary are one already
        self._looked_up: tuple[Tensor, ...] | None = None
        if rates.varies or rates.lam.numel() <= FEW_RATES:
            every = self._shaped(rates.scales(torch.arange(len(rates))))
            self._looked_up = tuple(scale.to(like.device, dtype) for scale in every)
        exact = torch.promote_types(dtype, torch.float32)
        lam, table = (x.to(like.device, exact) for x in (rates.lam, rates.table))
        self._rates = rates if rates.varies else DiscreteProcess(lam, table)

    def _shaped(self, scales: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(scale.reshape(*scale.shape, *self._ones) for scale in scales)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Both scales at training times `(batch,)` on the device, shaped to broadcast against a sample."""
        if self._looked_up is not None and not timesteps.is_floating_point():
            a, s = self._looked_up
            return a[timesteps], s[timesteps]
        a, s = self._shaped(self._rates.scales(timesteps.to(self._rates.table.device)))
        return a.to(timesteps.device, self._dtype), s.to(timesteps.device, self._dtype)
