r"""A multistep solver that is exact for Gaussian data, as coefficients, elementwise in $\lambda$.

With the data's mean $m$ and variance $v$ in each dimension, and $V = a^2 v + s^2$ the variance of $x_t$, let

$$ z = (x - a m) / \sqrt V, \qquad \tan\theta = a \sqrt v / s , $$

so that $\theta$ runs from near 0 at noise to $\pi/2$ at the data. The flow of Eq. 18 then is $dz / d\theta = F$ with

$$ F = \cos\theta \, (\hat x_0 - m) / \sqrt v - \sin\theta \, \hat\epsilon , $$

whose prediction is 0 for Gaussian data: only what is not Gaussian is left to the polynomial. $v \to 0$ is the flow in
$\hat x_0$ of DPM-Solver++, $v \to \infty$ that in $\hat\epsilon$ of DEIS, and at $\lambda = 1$, $m = 0$, $v = 1$ the
velocity is v-prediction's with its sign turned. The angle stays finite at the data, so the last step needs no lower
order.

The polynomial goes through the last values of $F$ in the clock $g^{1/4}$, in which the steps of the grid
`"quadratic"` are nearly equal where $\beta$ grows linearly; its integral over $\theta$ is taken by quadrature. A step
that is long beside those before it, as the last one of a long run is where the table of times has an end, takes a
lower order: a polynomial multiplies the errors of its nodes there.

References:
    Zhang, Chen (2023), "Fast Sampling of Diffusion Models with Exponential Integrator": polynomials in t (tAB-DEIS).
    Lu, Song (2025), "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models": the angle (TrigFlow).
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", Table 1: one variance of
        the data for all dimensions, in a network's preconditioning.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import process
from .coefficients import Coefficients
from .exponential import blind_calls, columns, moment_weights


LEAST_VARIANCE = 1e-8  # of the largest, or of 1: dimensions that do not vary take the limit v -> 0
QUADRATURE = 12  # points of Gauss and Legendre
ORDER = 3  # of 1 to 4 the best one over problems and numbers of steps
MOST_AMPLIFICATION = 5.0  # of errors of the nodes in a step; in equal steps it is 11 / 3 at order 3, and 2 at order 2


def trig(lam: Tensor, g: Tensor, g_next: Tensor, data_variance: Tensor) -> Coefficients:
    r"""Adams-Bashforth of order 3 in the angle $\theta$; `data_variance` broadcasts against `lam`."""
    path = AngularPath(lam, g, g_next, data_variance)
    return path.coefficients([path.polynomial_weights(i, path.nodes_at(i, ORDER)) for i in range(len(g))])


class AngularPath:
    r"""The angles of a run in each dimension, and what integrates F over them.

    Args:
        lam, g, g_next: As for [`Rule.coefficients`].
        data_variance: Broadcasts against `lam`.

    Attributes:
        angles: $\theta$ at the calls, `(n, *lambda_shape)`.
        ends: $\theta$ after each step, shaped the same.
        clock: $g^{1/4}$ at the calls and after the last step, `(n + 1, 1, ..., 1)`.
    """

    def __init__(self, lam: Tensor, g: Tensor, g_next: Tensor, data_variance: Tensor) -> None:
        self._lam, self._g, self._g_next = lam, g, g_next
        self._variance = data_variance.clamp(min=LEAST_VARIANCE * (float(data_variance.max()) or 1.0))
        self._root = self._variance.sqrt()
        self._blind = blind_calls(lam, g)
        self.clock = torch.cat([g, g_next[-1:]]) ** 0.25
        self.angles, self.ends = self._angle(g), self._angle(g_next)
        points, shares = (torch.from_numpy(x) / 2 for x in np.polynomial.legendre.leggauss(QUADRATURE))
        self._points, self._shares = points + 0.5, shares

    def nodes_at(self, i: int, most: int) -> int:
        """How many calls, at most so many, step i may look back on."""
        return min(most, max(1, i + 1 - self._blind))

    def polynomial_weights(self, i: int, count: int) -> list[Tensor]:
        """Of F at so many of the last calls, newest first, or at fewer where the step is long beside those before."""
        clock = self.clock
        step = clock[i + 1] - clock[i]
        nodes = [(clock[i - j] - clock[i]) / step for j in range(count)]
        while _amplification(nodes) > MOST_AMPLIFICATION:
            nodes.pop()
        total = self.ends[i] - self.angles[i]
        # by parts: of the angle itself, which is smoother than its rate
        points = self._points if nodes[1:] else ()
        turned = [self._angle((clock[i] + point * step) ** 4) - self.angles[i] for point in points]
        moments = [total]
        for k in range(1, len(nodes)):
            rest = sum(w * p ** (k - 1) * t for w, p, t in zip(self._shares, self._points, turned, strict=True))
            moments.append(total - k * rest)
        return moment_weights(nodes, moments)

    def coefficients(self, weights: list[list[Tensor]]) -> Coefficients:
        """With a row of weights of F for each step, newest first."""
        lam, g, g_next, root = self._lam, self._g, self._g_next, self._root
        a, s, a_next = process.mean_scale(lam, g), process.std(lam, g), process.mean_scale(lam, g_next)
        spread, spread_next = self._spread(g), self._spread(g_next)
        growth = spread_next / spread
        rows = [[spread_next[i] * w for w in row] for i, row in enumerate(weights)]
        velocity = Coefficients(x0=spread / (s * root), sample=-a * root / (s * spread), mean=-s / (root * spread))
        return Coefficients(
            sample=growth, mean=a_next - growth * a, **columns("velocity", rows), velocity_terms=velocity
        )

    def _angle(self, g: Tensor) -> Tensor:
        return torch.atan2(process.mean_scale(self._lam, g) * self._root, process.std(self._lam, g))

    def _spread(self, g: Tensor) -> Tensor:
        return process.marginal_moments(self._lam, g, torch.zeros_like(self._root), self._variance)[1].sqrt()


def _amplification(nodes: list[Tensor]) -> float:
    """Of errors as large as 1 in a step as long as 1, at worst."""
    one = torch.ones_like(nodes[0])
    weights = moment_weights(nodes, [one / (k + 1) for k in range(len(nodes))])
    return float(torch.stack(weights).abs().sum(0).max())
