r"""The Schrödinger bridge between two Gaussians, in closed form.

The reference is the isotropic process $dx = -\frac12 \lambda x \, dg + dw$ in the clock $dg = \beta_t dt$, with one
$\lambda \ge 0$: $\lambda = 1$ is the variance-preserving process, 0 the variance-exploding one. The bridge is the law
of paths nearest to it in the Kullback-Leibler divergence among those with $x_0 \sim N(m_0, \Sigma_0)$ and
$x_T \sim N(m_1, \Sigma_1)$. Its forward and backward drifts are

$$ -\tfrac12 \lambda x + \nabla \log \psi_t(x) , \qquad -\tfrac12 \lambda x - \nabla \log \hat\psi_t(x) , $$

both affine. With $a, s$ of the reference from $t$ to $T$ and $\psi_T(y) = e^{-\frac12 y^T Q y + q^T y}$,

$$ \nabla \log \psi_t(x) = A_t x + b_t , \quad A_t = -a^2 Q (I + s^2 Q)^{-1} , \quad b_t = a (I + s^2 Q)^{-1} q , $$

which is the optimum that a linear forward score (Eq. 10) aims at, and
$\nabla \log \psi_t + \nabla \log \hat\psi_t = \nabla \log p_t$.

Times are values of $g$ in $[0, g_T]$; tensors are float64 on the CPU. Samples are `(..., d)`.

References:
    Bunne, Hsieh, Cuturi, Krause (2023), "The Schrödinger Bridge between Gaussian Measures has a Closed Form", AISTATS:
        Theorem 3.
    Janati, Muzellec, Peyré, Cuturi (2020), "Entropic Optimal Transport between Unbalanced Gaussian Measures has a
        Closed Form": the static coupling.
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", sections 6 and 7.1.
"""

import math

import torch
from torch import Tensor

from .. import process


class GaussianSchrodingerBridge:
    r"""The bridge from $N(m_0, \Sigma_0)$ to $N(m_1, \Sigma_1)$ in the time $g_T$.

    Args:
        mean (`Tensor`): $m_0$ of the data, shape `(d,)`.
        covariance (`Tensor`): $\Sigma_0$, positive definite, `(d, d)`.
        total (`float`): $g_T$, the integral of beta, positive and finite.
        prior_mean (`Tensor`, *optional*): $m_1$, `(d,)`. Defaults to 0.
        prior_covariance (`Tensor`, *optional*): $\Sigma_1$, positive definite, `(d, d)`. Defaults to the identity.
        lam (`float`, defaults to 1.0): The reference's $\lambda$, not negative.

    Attributes:
        coupling: $E[(x_0 - m_0)(x_T - m_1)^T]$, the entropic plan's, `(d, d)`.

    Raises:
        ValueError: An argument has another shape or is out of its range.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        total: float,
        prior_mean: Tensor | None = None,
        prior_covariance: Tensor | None = None,
        lam: float = 1.0,
    ):
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        d = covariance.shape[-1]
        self.mean = _vector("mean", mean, d)
        self.covariance = _positive_definite("covariance", covariance, d)
        self.prior_mean = _vector("prior_mean", torch.zeros(d) if prior_mean is None else prior_mean, d)
        prior_covariance = torch.eye(d) if prior_covariance is None else prior_covariance
        self.prior_covariance = _positive_definite("prior_covariance", prior_covariance, d)
        if not 0 < total < math.inf:
            raise ValueError(f"`total` must be positive and finite, got {total}.")
        if not lam >= 0:
            raise ValueError(f"`lam` must not be negative, got {lam}.")
        self.lam, self.total = torch.tensor([lam, total], dtype=torch.float64)
        self._eye = torch.eye(d, dtype=torch.float64)

        a, s2 = process.mean_scale(self.lam, self.total), process.variance(self.lam, self.total)
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors @ (values.sqrt()[:, None] * vectors.T)
        inverse_root = vectors @ (values.rsqrt()[:, None] * vectors.T)
        mu, axes = torch.linalg.eigh(root @ self.prior_covariance @ root)
        # (sqrt(4 a^2 mu + s^4) - s^2) / 2a, written without the difference
        strength = 2 * a * mu / ((4 * a**2 * mu + s2**2).sqrt() + s2)
        self.coupling = root @ axes @ (strength[:, None] * axes.T) @ inverse_root
        conditional = self.prior_covariance - self.coupling.T @ torch.linalg.solve(self.covariance, self.coupling)
        precision = torch.linalg.inv((conditional + conditional.T) / 2)
        self._q_matrix = precision - self._eye / s2
        self._q_vector = precision @ self.prior_mean - a / s2 * self.mean

    def _to_prior(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's a and s^2 from each time to the end, each `(..., 1, 1)`."""
        left = (self.total - g)[..., None, None]
        return process.mean_scale(self.lam, left), process.variance(self.lam, left)

    def marginal(self, g: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(..., d)` and covariance `(..., d, d)` of $p_t$ at times `g` of shape `(...)`."""
        g = self._times(g)
        on_prior, on_data, variance = process.posterior(self.lam, self.total, g[..., None])
        mean = on_data * self.mean + on_prior * self.prior_mean
        on_prior, on_data, variance = on_prior[..., None], on_data[..., None], variance[..., None]
        ends = on_data**2 * self.covariance + on_prior**2 * self.prior_covariance
        return mean, ends + on_data * on_prior * (self.coupling + self.coupling.T) + variance * self._eye

    def forward_score(self, g: float | Tensor) -> tuple[Tensor, Tensor]:
        r"""$A_t$ `(..., d, d)` and $b_t$ `(..., d)` of $\nabla \log \psi_t(x) = A_t x + b_t$."""
        a, s2 = self._to_prior(self._times(g))
        inverse = torch.linalg.inv(self._eye + s2 * self._q_matrix)
        matrix = -(a**2) * self._q_matrix @ inverse
        return (matrix + matrix.mT) / 2, (a * inverse) @ self._q_vector

    def score(self, x: Tensor, g: float | Tensor) -> Tensor:
        r"""$\nabla \log p_t(x)$ for `x` of shape `(n, d)` at one time `g`."""
        mean, covariance = self.marginal(g)
        return -torch.linalg.solve(covariance, (x.double() - mean).mT).mT

    def backward_score(self, x: Tensor, g: float | Tensor) -> Tensor:
        r"""$\nabla \log \hat\psi_t(x)$ for `x` of shape `(n, d)` at one time `g`."""
        matrix, vector = self.forward_score(g)
        return self.score(x, g) - x.double() @ matrix - vector

    def velocity(self, x: Tensor, g: float | Tensor) -> Tensor:
        r"""$dx/dg$ of the probability flow (Eq. 18): the mean of both drifts, `(n, d)` at one time `g`."""
        matrix, vector = self.forward_score(g)
        x = x.double()
        return x @ matrix + vector + process.ode_drift(self.lam, x, self.score(x, g))

    def variational_gap(self, drift: Tensor, g: Tensor) -> float:
        r"""$KL(L \| L^A)$ of Theorem 4, in nats: of the bridge from the process with the forward score $A_t x$.

        It is $\frac12 \int E |A_t x - \nabla \log \psi_t(x)|^2 dg$ under the bridge, by the trapezoidal rule.

        Args:
            drift (`Tensor`): $A_t$ at the times `g`, `(n, d, d)`.
            g (`Tensor`): Increasing, from 0 to $g_T$, `(n,)`.
        """
        g = self._times(g)
        matrix, vector = self.forward_score(g)
        mean, covariance = self.marginal(g)
        difference = drift.double() - matrix
        off = (difference @ mean[..., None])[..., 0] - vector
        spread = (difference @ covariance @ difference.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        return float(torch.trapezoid(off.square().sum(-1) + spread, g) / 2)

    def _times(self, g: float | Tensor) -> Tensor:
        g = torch.as_tensor(g, dtype=torch.float64)
        if not ((g >= 0) & (g <= self.total)).all():
            raise ValueError(f"`g` must lie in [0, {float(self.total):g}], got {g.tolist()}.")
        return g


def _vector(name: str, value: Tensor, d: int) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.shape != (d,) or not torch.isfinite(value).all():
        raise ValueError(f"`{name}` must be finite, of shape ({d},), got {value.tolist()}.")
    return value


def _positive_definite(name: str, value: Tensor, d: int) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.shape != (d, d) or not torch.allclose(value, value.T) or not (torch.linalg.eigvalsh(value) > 0).all():
        raise ValueError(f"`{name}` must be symmetric and positive definite, ({d}, {d}), got {value.tolist()}.")
    return value
