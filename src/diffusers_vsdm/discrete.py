r"""The process of a drift at N training times: g between the entries of a table, whatever the rates do in time.

Index k of N training times means t = (k + 1) / N, and k = -1 is the data. Between two training times a fractional k
stands for the time whose $\log g$ lies between theirs.
"""

import numpy as np
import torch
from torch import Tensor

from . import process


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


def training_time_at(g: Tensor, table: Tensor) -> Tensor:
    """The training time k, fractional, at which the integrated beta is `g`: [`integrated_beta_at`] the other way.

    Args:
        g: Between the table's first and last entry, any shape.
        table: g at the N training times, increasing and finite, `(N,)`.
    """
    log = table.log()
    above = torch.searchsorted(table, g.to(table).contiguous()).clamp(1, len(table) - 1)
    share = (g.to(table).log() - log[above - 1]) / (log[above] - log[above - 1])
    return above - 1 + share.clamp(0, 1)


class DiscreteProcess:
    r"""Rates and their clock, elementwise: $x_t = c_t y_t$ with $y$ a process of constant rate `lam` at some $g_t$.

    Where the drift does not vary in time, $c = 1$. Where it does, `lam` is 1 and $c$ and $g$ carry the variation, one
    value for each dimension: see [`process.at_unit_rate`].

    Args:
        lam: Lambda in float64: a scalar, or shaped as the drift's; if `varies`, `(N, *shape)`.
        table: g at the training times, `(N,)` in float64.
        varies: Whether the first dimension of `lam` is time.

    Attributes:
        lam: The constant rate, a scalar or of the drift's shape.
        table: g at the training times, `(N,)`.
        varies: Whether $c$ is not 1.

    Raises:
        ValueError: A lambda that varies has another number of times than the table.
    """

    def __init__(self, lam: Tensor, table: Tensor, varies: bool = False):
        self.table, self.varies = table, varies
        if not varies:
            self.lam = lam
            return
        if len(lam) != len(table):
            raise ValueError(f"The drift has a lambda for each of {len(lam)} training times, the table {len(table)}.")
        self.lam = torch.ones_like(lam[0])
        self._rates = lam
        log_a, s2 = process.piecewise_scales(lam, table)
        self._log_a, self._s2 = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (log_a, s2))  # -1 is the data

    def __len__(self) -> int:
        return len(self.table)

    def at(self, k: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """$g$ and $c$ at training times `k` of shape `(n,)`, whole or fractional, on the table's device.

        They have the shape `(n, *shape)` if the rates vary, else `(n, 1, ..., 1)`.
        """
        g = integrated_beta_at(k, self.table).reshape(-1, *[1] * self.lam.ndim)
        if not self.varies:
            return g, torch.ones_like(g)
        k = torch.as_tensor(k, device=self.table.device).double()
        below = k.floor().long().clamp(-1, len(self) - 1)
        rate = self._rates[(below + 1).clamp(max=len(self) - 1)]
        start = torch.cat([self.table, self.table.new_zeros(1)])[below].reshape(g.shape)
        step = torch.where(g == start, 0.0, g - start)  # not inf - inf
        s2 = torch.exp(-rate * step) * self._s2[below] + process.variance(rate, step)
        return process.at_unit_rate(self._log_a[below] - 0.5 * rate * step, s2)

    def scales(self, k: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        r"""$a$ and $s$ of $x_t = a_t x_0 + s_t \epsilon$ at training times `k`, `(n, *shape)`."""
        g, c = self.at(k)
        a, s = process.mean_scale(self.lam, g), process.std(self.lam, g)
        return (c * a, c * s) if self.varies else (a, s)
