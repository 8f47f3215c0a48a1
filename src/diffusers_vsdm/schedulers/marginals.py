r"""The forward process at training times: g between the entries of a table, and the scales a and s.

Index k of N training times means t = (k + 1) / N, and k = -1 is the data. Between two training times a fractional k
stands for the time whose $\log g$ lies between theirs.
"""

import numpy as np
import torch
from torch import Tensor

from .. import process


FEW_RATES = 64  # so many are looked up in a table at every training time


def integrated_beta_at(k: np.ndarray | Tensor, table: Tensor) -> Tensor:
    """The integrated beta at training times `k`, whole or fractional, in the shape of `k`; -1 is the data.

    Args:
        k: In [-1, N - 1].
        table: g at the N training times, increasing, `(N,)`.
    """
    k = torch.as_tensor(np.ascontiguousarray(k)) if isinstance(k, np.ndarray) else k
    if not k.is_floating_point():
        return torch.cat([table, table.new_zeros(1)])[k]  # index -1 is the last
    position = k.to(table.dtype).clamp(0, len(table) - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=len(table) - 1)
    log = table.log()
    between = torch.exp(torch.lerp(log[below], log[above], position - below))
    return torch.where(k < 0, 0.0, torch.where(position == below, table[below], between))


def log_sigma(lam: Tensor, table: Tensor) -> np.ndarray:
    """log(s / a) at every training time, the mean over dimensions: `(N,)`."""
    return np.array([-0.5 * float(process.log_snr(lam, g).mean()) for g in table])


class Marginals:
    r"""The scales of $x_t = a_t x_0 + s_t \epsilon$ for samples of one type on one device.

    Args:
        lam: Lambda in float64: a scalar, or shaped as the drift's.
        table: g at the training times, `(N,)` in float64.
        like: A sample `(batch, *event_shape)`, for number of dimensions and device.
        dtype: Of the scales. They are computed in float32 at least.
    """

    def __init__(self, lam: Tensor, table: Tensor, like: Tensor, dtype: torch.dtype):
        self._ones = [1] * (like.ndim - 1)
        self._dtype = dtype
        # no table of scales for many rates: it would be N times as large as a sample
        self._looked_up: tuple[Tensor, ...] | None = None
        if lam.numel() <= FEW_RATES:
            self._looked_up = tuple(scale.to(like.device, dtype) for scale in self._scales(lam, table))
        exact = torch.promote_types(dtype, torch.float32)
        self._lam, self._table = (x.to(like.device, exact) for x in (lam, table))

    def _scales(self, lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g.reshape(-1, *self._ones)
        return process.mean_scale(lam, g), process.std(lam, g)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Both scales at training times `(batch,)` on the device, shaped to broadcast against a sample."""
        if self._looked_up is not None and not timesteps.is_floating_point():
            a, s = self._looked_up
            return a[timesteps], s[timesteps]
        a, s = self._scales(self._lam, integrated_beta_at(timesteps, self._table))
        return a.to(self._dtype), s.to(self._dtype)
