r"""The solver in the angle with weights that are fitted to Gaussian data of unknown variance, as coefficients.

Where the data's variance is not $v$, as the path of `trigonometric.py` takes it, but $q v$, the standardised sample
moves with the angle as

$$ z(\theta) = \frac{r_q(\theta)}{r_q(\theta_0)} z(\theta_0), \qquad r_q = \sqrt{\cos^2\theta + q \sin^2\theta} ,
   \qquad F = \frac{r_q'}{r_q} z = \frac{(q - 1) \sin\theta \cos\theta}{r_q^2} z : $$

$\hat x_0$ is constant for $q \to 0$; $\hat\epsilon$ is for $q \to \infty$, where z moves as it does for a mean that is
not what it is taken for. Data with several modes are such Gaussians too, a wide one at noise and, in each mode, a
narrow one near the data. So a step's weights $w_j$ of the last values of F are those that minimise, over a log-normal
prior of q around 1,

$$ E_q \frac q {1 + q} \Bigl( \frac{r_q(\theta_{i+1}) - z_i - \sum_j w_j F_{i-j}}{r_q(\theta_{i+1})} \Bigr)^2
   + \eta_i^2 \sum_j (w_j - u_j)^2, \qquad \sum_j w_j = \theta_{i+1} - \theta_i , $$

where $z$ and $F$ are what the solver itself has made of that Gaussian up to then, from $z_0 = r_q(\theta_0)$: what
earlier steps did wrong, the first ones above all, is taken back. $q / (1 + q)$ stands for errors in the data's own
units. $u$ are the weights of the polynomial of `trig`, which those here may leave the less the more steps there are,
and the less the longer a step is in the angle beside the one before, as the last one is in dimensions that are
narrower than the first training time's noise: $\eta_i$ is inverse to the number of steps, times that ratio. It is the
noise of a regression, for what is in F that no Gaussian explains, and keeps the weights small where the values of F
hardly tell one q from another.

References:
    O'Hagan (1991), "Bayes-Hermite Quadrature": weights that err least, in the mean over a prior of integrands.
    Gautschi (1961), "Numerical Integration of Ordinary Differential Equations Based on Trigonometric Polynomials":
        multistep weights fitted to other functions than polynomials.
"""

import numpy as np
import torch
from torch import Tensor

from .coefficients import Coefficients
from .trigonometric import ORDER, AngularPath


NODES = 4
DECADES = 1.0  # standard deviation of the prior's log10 q
PRIOR_POINTS = 16  # of Gauss-Hermite quadrature over the prior
TINY = torch.finfo(torch.float64).tiny  # where no angle is left at all
SLACK = 0.2  # eta times the number of steps, in a step that is no longer than the one before


def trig_fitted(lam: Tensor, g: Tensor, g_next: Tensor, data_variance: Tensor) -> Coefficients:
    """Multistep with four values of F; `data_variance` broadcasts against `lam`."""
    path = AngularPath(lam, g, g_next, data_variance)
    nodes, masses = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(PRIOR_POINTS))
    shape = (-1,) + (1,) * (path.angles.dim() - 1)
    q = (10 ** (DECADES * nodes)).view(shape)
    importance = (masses / masses.sum()).view(shape) * q / (1 + q)

    def spread(angle: Tensor) -> Tensor:
        return (angle.cos() ** 2 + q * angle.sin() ** 2).sqrt()

    turns = path.ends - path.angles
    stretch = torch.cat([torch.ones_like(turns[:1]), turns[1:] / turns[:-1].clamp(min=TINY)]).clamp(min=1.0)
    penalties = (SLACK / len(g) * stretch) ** 2
    z = spread(path.angles[0])
    velocities: list[Tensor] = []
    weights = []
    for i in range(len(g)):
        angle, end = path.angles[i], spread(path.ends[i])
        velocities = [(q - 1) * angle.sin() * angle.cos() / spread(angle) ** 2 * z, *velocities][:NODES]
        count = path.nodes_at(i, NODES)
        row = path.polynomial_weights(i, min(count, ORDER))
        row += [torch.zeros_like(row[0])] * (count - len(row))
        missing = end - z - _combined(row, velocities)
        slopes = [v - velocities[0] for v in velocities[1:count]]  # what moves weight from the newest to an older one
        change = _ridge(slopes, missing, importance / end**2, penalties[i])
        row = [w + c for w, c in zip(row, [-sum(change, torch.zeros_like(row[0])), *change], strict=True)]
        z = z + _combined(row, velocities)
        weights.append(row)
    return path.coefficients(weights)


def _combined(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.stack([w * v for w, v in zip(weights, values, strict=False)]).sum(0)


def _ridge(slopes: list[Tensor], target: Tensor, importance: Tensor, penalty: Tensor) -> list[Tensor]:
    """The `c` least in `sum importance (target - c . slopes)^2 + penalty (|c|^2 + (sum c)^2)`, elementwise.

    The sum is over the first dimension. By Gaussian elimination, which needs no pivots in a positive definite matrix.
    """
    n = len(slopes)
    matrix = [
        [(importance * slopes[i] * slopes[j]).sum(0) + penalty * (1 + (i == j)) for j in range(n)] for i in range(n)
    ]
    right = [(importance * slope * target).sum(0) for slope in slopes]
    for k in range(n):
        for i in range(k + 1, n):
            factor = matrix[i][k] / matrix[k][k]
            matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[k], strict=True)]
            right[i] = right[i] - factor * right[k]
    for k in reversed(range(n)):
        for j in range(k + 1, n):
            right[k] = right[k] - matrix[k][j] * right[j]
        right[k] = right[k] / matrix[k][k]
    return right
