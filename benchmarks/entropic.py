r"""Entropic transport from a Gaussian to a mixture of Gaussians, whose plan is known.

The construction of Korotin, Gushchin and Burnaev (2024), "Light Schrödinger Bridge": any $v(y)$ that is a mixture of
Gaussians makes the plan

$$ \pi(y | x) \propto e^{\langle x, y \rangle / \epsilon} v(y), \qquad
   v(y) = \sum_k \alpha_k N(y | r_k, \epsilon S_k) $$

optimal between the source $p(x)$ and its own other end, for the cost $\frac12 |x - y|^2$ and the regularisation
$\epsilon$ of the entropy. It is a mixture again, of $N(r_k + S_k x, \epsilon S_k)$ with the weights
$\alpha_k e^{(x^T S_k x + 2 r_k^T x) / 2 \epsilon}$. The source is N(0, I), Gaussian as in the benchmark of Gushchin et
al. (2023), "Building the Bridge of Schrödinger: A Continuous Entropic Optimal Transport Benchmark"; the numbers of the
plan are our own draw, so that figures are not those of its tables.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


COMPONENTS = 5
RADIUS = 2.0  # of the sphere that the r_k lie on
SPREAD = (0.25, 0.75)  # eigenvalues of S_k


@dataclass(frozen=True)
class EntropicTransport:
    """A problem and its solution.

    Attributes:
        epsilon: The regularisation.
        weights: alpha, `(K,)`.
        shifts: r, `(K, d)`.
        scales: S, diagonal, `(K, d)`.
    """

    epsilon: float
    weights: Tensor
    shifts: Tensor
    scales: Tensor

    @classmethod
    def draw(cls, dimension: int, epsilon: float, seed: int = 0) -> Self:
        """A problem of this size."""
        generator = torch.Generator().manual_seed(seed)
        shape = (COMPONENTS, dimension)
        shifts = torch.randn(shape, generator=generator, dtype=torch.float64)
        shifts = RADIUS * shifts / shifts.norm(dim=1, keepdim=True)
        least, most = SPREAD
        scales = least + (most - least) * torch.rand(shape, generator=generator, dtype=torch.float64)
        # as likely from x = 0
        return cls(epsilon, torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64), shifts, scales)

    def plan(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each x `(n, d)`: the logarithms of the weights `(n, K)` and the means `(n, K, d)`."""
        x = x.double()[:, None]
        logits = self.weights.log() + (self.scales * x**2 + 2 * self.shifts * x).sum(2) / (2 * self.epsilon)
        return logits.log_softmax(1), self.shifts + self.scales * x

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One end for each x, `(n, d)`."""
        log_weights, means = self.plan(x)
        k = torch.multinomial(log_weights.exp(), 1, generator=generator)[:, 0]
        rows = torch.arange(len(x))
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (means[rows, k] + (self.epsilon * self.scales[k]).sqrt() * noise).float()

    def conditional_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(n, d)` and covariance `(n, d, d)` of the plan's law given x."""
        log_weights, means = self.plan(x)
        weights = log_weights.exp()
        mean = torch.einsum("nk,nkd->nd", weights, means)
        off = means - mean[:, None]
        covariance = torch.einsum("nk,nki,nkj->nij", weights, off, off)
        within = torch.einsum("nk,kd->nd", weights, self.epsilon * self.scales)
        return mean, covariance + torch.diag_embed(within)


def bures_wasserstein(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between Gaussians, `(...)`."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ (values.clamp(min=0).sqrt()[..., None] * vectors.mT)
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum(-1)
    traces = (covariance + other_covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean - other_mean).square().sum(-1) + traces - 2 * cross


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(..., d)` and covariance `(..., d, d)` of samples `(..., n, d)`."""
    samples = samples.double()
    mean = samples.mean(-2)
    off = samples - mean[..., None, :]
    return mean, off.mT @ off / (samples.shape[-2] - 1)


def unexplained_variance(
    transport: EntropicTransport, rows: Tensor, ends: Tensor, all_ends: Tensor, reference: Tensor
) -> dict[str, float]:
    """How far conditional and marginal laws are from the plan's, by their first two moments.

    Args:
        transport: The problem.
        rows: Samples of the source, `(n, d)`.
        ends: Samples from each of them, `(n, m, d)`.
        all_ends: Samples from many more, one from each, `(k, d)`.
        reference: Many samples of the other end, `(N, d)`.

    Returns:
        `cBW2-UVP` and `BW2-UVP` of Gushchin et al.: Bures-Wasserstein distances for the cost 1/2 |x - y|^2, in per
        cent of half the variance of the end. A constant, the mean, has BW2-UVP 100.
    """
    mean, covariance = moments(reference)
    unit = float(covariance.diagonal().sum()) / 100  # the halves of cost and variance cancel
    conditional = bures_wasserstein(*moments(ends), *transport.conditional_moments(rows)).mean()
    marginal = bures_wasserstein(*moments(all_ends), mean, covariance)
    return {"cBW2-UVP": float(conditional) / unit, "BW2-UVP": float(marginal) / unit}
