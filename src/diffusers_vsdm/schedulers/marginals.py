r"""The scales a and s of the forward process at training times, on a device and in a type."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..discrete import DiscreteProcess
from ..process import log_snr


FEW_RATES = 64  # so many are looked up in a table at every training time


def log_sigma(process: DiscreteProcess, reduce: Callable[[Tensor], Tensor]) -> np.ndarray:
    """log(s / a) at every training time, `(N,)`, at the log-SNR that `reduce` makes of all dimensions'."""
    at = (process.at(torch.tensor([k]))[0] for k in range(len(process)))
    return np.array([-0.5 * float(reduce(log_snr(process.lam, g))) for g in at])


class Marginals:
    r"""The scales of $x_t = a_t x_0 + s_t \epsilon$ for samples of one type on one device.

    Args:
        process: In float64 on the CPU.
        like: A sample `(batch, *event_shape)`, for number of dimensions and device.
        dtype: Of the scales. They are computed in float32 at least.
    """

    def __init__(self, process: DiscreteProcess, like: Tensor, dtype: torch.dtype):
        self._ones = [1] * (like.ndim - 1 - process.lam.ndim)
        self._dtype = dtype
        # no table of scales for many rates: it would be N times as large as a sample. Rates that vary are one already
        self._looked_up: tuple[Tensor, ...] | None = None
        if process.varies or process.lam.numel() <= FEW_RATES:
            every = self._shaped(process.scales(torch.arange(len(process))))
            self._looked_up = tuple(scale.to(like.device, dtype) for scale in every)
        exact = torch.promote_types(dtype, torch.float32)
        lam, table = (x.to(like.device, exact) for x in (process.lam, process.table))
        self._process = process if process.varies else DiscreteProcess(lam, table)

    def _shaped(self, scales: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(scale.reshape(*scale.shape, *self._ones) for scale in scales)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Both scales at training times `(batch,)` on the device, shaped to broadcast against a sample."""
        if self._looked_up is not None and not timesteps.is_floating_point():
            a, s = self._looked_up
            return a[timesteps], s[timesteps]
        a, s = self._shaped(self._process.scales(timesteps.to(self._process.table.device)))
        return a.to(timesteps.device, self._dtype), s.to(timesteps.device, self._dtype)
