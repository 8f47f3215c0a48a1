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

import numpy as np
import torch
from torch import Tensor

from .. import process
from .coefficients import Coefficients
from .exponential import blind_calls, columns, moment_weights


LEAST_VARIANCE = 1e-8  # of the largest, or of 1: dimensions that do not vary take the limit v -> 0
QUADRATURE_POINTS = 12
ORDER = 3  # of 1 to 4 the best one over problems and numbers of steps
MOST_AMPLIFICATION = 5.0  # of errors of the nodes in a step; in equal steps it is 11 / 3 at order 3, and 2 at order 2


def trig(lam: Tensor, g: Tensor, g_next: Tensor, data_variance: Tensor) -> Coefficients:
    r"""Adams-Bashforth of order 3 in the angle $\theta$; `data_variance` broadcasts against `lam`."""
    variance = data_variance.clamp(min=LEAST_VARIANCE * (float(data_variance.max()) or 1.0))
    root = variance.sqrt()

    def angle(g: Tensor) -> Tensor:
        return torch.atan2(process.mean_scale(lam, g) * root, process.std(lam, g))

    def spread(g: Tensor) -> Tensor:
        return process.marginal_moments(lam, g, torch.zeros_like(root), variance)[1].sqrt()

    points, shares = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(QUADRATURE_POINTS))
    points, shares = (points + 1) / 2, shares / 2
    clock = torch.cat([g, g_next[-1:]]) ** 0.25
    start, end = angle(g), angle(g_next)
    blind = blind_calls(lam, g)
    weights = []
    for i in range(len(g)):
        step = clock[i + 1] - clock[i]
        nodes = [(clock[i - j] - clock[i]) / step for j in range(min(ORDER, max(1, i + 1 - blind)))]
        while _amplification(nodes) > MOST_AMPLIFICATION:
            nodes.pop()
        count = len(nodes)
        total = end[i] - start[i]
        # by parts: of the angle itself, which is smoother than its rate
        turned = [angle((clock[i] + point * step) ** 4) - start[i] for point in points] if count > 1 else []
        moments = [total]
        for k in range(1, count):
            rest = sum(w * p ** (k - 1) * t for w, p, t in zip(shares, points, turned, strict=True))
            moments.append(total - k * rest)
        weights.append([spread(g_next[i]) * w for w in moment_weights(nodes, moments)])
    a, s, a_next = process.mean_scale(lam, g), process.std(lam, g), process.mean_scale(lam, g_next)
    growth = spread(g_next) / spread(g)
    velocity = Coefficients(
        x0=spread(g) / (s * root), sample=-a * root / (s * spread(g)), mean=-s / (root * spread(g))
    )
    return Coefficients(
        sample=growth, mean=a_next - growth * a, **columns("velocity", weights), velocity_terms=velocity
    )


def _amplification(nodes: list[Tensor]) -> float:
    """Of errors as large as 1 in a step as long as 1, at worst."""
    one = torch.ones_like(nodes[0])
    weights = moment_weights(nodes, [one / (k + 1) for k in range(len(nodes))])
    return float(torch.stack(weights).abs().sum(0).max())
