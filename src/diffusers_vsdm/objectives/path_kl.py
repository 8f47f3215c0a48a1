r"""One bound for score-based models, VSDM and SB-FBSDE: the divergence between paths forth and back.

In the clock $dg = \beta dt$ let data diffuse by $dx = u \, dg + dw$ with densities $p_t$, and let samples be made from
a prior $\pi$ by $x_{t-h} = x_t - b h + \sqrt h \xi$. Then (Eq. 20)

$$ KL(p_0 \| \text{model}) \le \underbrace{KL(p_T \| \pi)}_{\text{prior loss}} + \underbrace{\tfrac12 \int
   E |u - \nabla \log p_t - b|^2 \, dg}_{\text{drift matching}} . $$

Without the score, by partial integration and up to the data's entropy (Eq. 24), the right side is

$$ -E \log \pi(x_T) + \tfrac12 \int E \left[ |u - b|^2 - 2 \nabla \cdot b \right] dg . $$

A score-based model has $u = -\frac12 x$, a variational Schrödinger diffusion model $u = -\frac12 D x$ with a learned
$D$, SB-FBSDE networks on both sides. For the first two, $b = u - s_\theta$, and the drift matching is the explicit
score matching of Eq. 22 and 23; with $\nabla \log p(x_t | x_0)$ for the score it is the denoising one, which is larger
by a constant.

References:
    Kaba, Shimizu, Ohzeki, Sughiyama (2024), "Schrödinger Bridge Type Diffusion Models as an Extension of Variational
        Autoencoders": equation numbers above.
    Song et al. (2021), "Maximum Likelihood Training of Score-Based Diffusion Models".
    Kingma et al. (2021), "Variational Diffusion Models": the bound for one sample, and the times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import process
from ..discrete import training_time_at
from ..schedulers import VSDMScheduler
from .divergence import divergence, draw_probe


# at x of shape (n, *event_shape) and times g of shape (n,)
Drift = Callable[[Tensor, Tensor], Tensor]


# Integrands ------------------------------------------------------------------------------------------------------


def drift_matching(forward: Tensor, score: Tensor, backward: Tensor) -> Tensor:
    r"""$\frac12 |u - \nabla \log p_t - b|^2$ (Eq. 19): of `(n, *event_shape)`, shape `(n,)`."""
    return 0.5 * (forward - score - backward).square().flatten(1).sum(1)


def implicit_matching(forward: Tensor, backward: Tensor, backward_divergence: Tensor) -> Tensor:
    r"""$\frac12 |u - b|^2 - \nabla \cdot b$ (Eq. 24): of `(n, *event_shape)` and `(n,)`, shape `(n,)`."""
    return 0.5 * (forward - backward).square().flatten(1).sum(1) - backward_divergence


def path_log_ratio(path: Tensor, g: Tensor, reversal: Tensor, backward: Tensor) -> Tensor:
    r"""Log-ratio of the densities of simulated paths, given their ends at $T$: reversed forward to backward process.

    The sum over the steps of two Gaussians' log-densities (before Eq. D3); its mean is the drift matching, where the
    paths are those of the forward process.

    Args:
        path: $x$ at the times `g`, `(m, n, *event_shape)`.
        g: Falling, `(m,)`.
        reversal, backward: $u - \nabla \log p_t$ and $b$ at the first $m - 1$ points of the path.

    Returns:
        `(n,)`, in nats.
    """
    steps = -torch.diff(g).reshape(-1, *[1] * (path.ndim - 1))
    moved = path[:-1] - path[1:]
    squares = (moved - backward * steps).square() - (moved - reversal * steps).square()
    return (squares / (2 * steps)).flatten(2).sum((0, 2))


# Estimates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        value: The mean, in nats.
        standard_error: Its standard error.
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, samples: Tensor) -> "Estimate":
        """From independent samples `(n,)`."""
        return cls(float(samples.mean()), float(samples.std() / math.sqrt(len(samples))))


def draw_times(u: Tensor, lam: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    r"""Times $g$ from uniform numbers, with a density proportional to $1/s^2$, and its inverse.

    Such times are uniform in the log-SNR. Matching errors in $\epsilon$ of one size at all times then have one size
    in the integral too.

    Args:
        u: In [0, 1), any shape.
        lam: The rate that the times are for, a scalar.
        start, end: Between which times, positive scalars.

    Returns:
        `g` and `1 / density`, both of the shape of `u`.
    """
    first, last = process.log_snr(lam, start), process.log_snr(lam, end)
    g = process.time_of_log_snr(lam, first + u * (last - first))
    return g, process.variance(lam, g) * (first - last)


@dataclass(frozen=True)
class PathKL:
    r"""The bound for a pair of drifts, estimated from samples of the forward process.

    Attributes:
        forward, backward: $u$ and $b$, functions of `x` `(n, *event_shape)` and of `g` `(n,)`.
        total: $g_T$.
        log_prior: $\log \pi$, from `(n, *event_shape)` to `(n,)`.
    """

    forward: Drift
    backward: Drift
    total: float
    log_prior: Callable[[Tensor], Tensor]

    def prior_loss(self, end: Tensor, log_density: Tensor) -> Estimate:
        r"""$KL(p_T \| \pi)$ from samples $x_T$ and $\log p_T$ there, `(n,)`."""
        return Estimate.of(log_density - self.log_prior(end))

    def prior_cross_entropy(self, end: Tensor) -> Estimate:
        r"""$-E \log \pi(x_T)$ from samples $x_T$: what is left of the prior loss in Eq. 24."""
        return Estimate.of(-self.log_prior(end))

    def explicit(self, x: Tensor, g: Tensor, score: Tensor, inverse_density: Tensor | None = None) -> Estimate:
        r"""Drift matching, with a score: $\nabla \log p_t(x_t)$, or $\nabla \log p(x_t | x_0)$ for the denoising form.

        Args:
            x: Samples of $x_t$, each at a time of its own.
            g: These times, `(n,)`.
            score: At `x`.
            inverse_density: One over the density that the times were drawn from, `(n,)`. Defaults to $g_T$, for
                uniform ones.

        Raises:
            FloatingPointError: A drift is not finite.
        """
        u, b = self._finite("forward", self.forward(x, g)), self._finite("backward", self.backward(x, g))
        return self._integral(drift_matching(u, score, b), inverse_density)

    def implicit(
        self,
        x: Tensor,
        g: Tensor,
        inverse_density: Tensor | None = None,
        kind: str = "exact",
        generator: torch.Generator | None = None,
    ) -> Estimate:
        r"""The integral of Eq. 24; arguments as in [`explicit`], and the divergence as in [`draw_probe`].

        Raises:
            FloatingPointError: A drift is not finite.
            ValueError: The divergence cannot be had in this dimension.
        """
        probe = draw_probe(x, kind, generator)
        b, backward_divergence = divergence(lambda y: self.backward(y, g), x, probe)
        u, b = self._finite("forward", self.forward(x, g)), self._finite("backward", b)
        return self._integral(implicit_matching(u, b, backward_divergence), inverse_density)

    def _integral(self, values: Tensor, inverse_density: Tensor | None) -> Estimate:
        return Estimate.of(values * (self.total if inverse_density is None else inverse_density))

    @staticmethod
    def _finite(name: str, value: Tensor) -> Tensor:
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value.flatten(1)).all(1)).sum())
            raise FloatingPointError(f"The {name} drift is not finite at {bad} of {len(value)} samples.")
        return value


# The bound for one sample ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LikelihoodBound:
    r"""Parts of an upper bound of $-\log p(x_0)$ for a model that samples by the SDE.

    Each part is `(batch,)`, in nats, in float64 on the CPU.

    Attributes:
        prior_loss: $KL(p(x_T | x_0) \| \pi)$.
        drift_matching: $\frac12 \int E |s_\theta - \nabla \log p(x_t | x_0)|^2 dg$ from the first training time on,
            by one or several random times.
        reconstruction: $-E \log N(x_0; x_1 / a_1, s_1^2 / a_1^2)$ at the first training time.
    """

    prior_loss: Tensor
    drift_matching: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, `(batch,)`."""
        return self.prior_loss + self.drift_matching + self.reconstruction


@torch.no_grad()
def likelihood_bound(
    score: Callable[[Tensor, Tensor], Tensor],
    scheduler: VSDMScheduler,
    sample: Tensor,
    num_times: int = 8,
    generator: torch.Generator | None = None,
) -> LikelihoodBound:
    r"""The bound of a model with a score, at samples of data.

    The times are uniform in the log-SNR, and those of one sample equally far apart.

    Args:
        score: $s_\theta(x_t, k)$ at training times k `(batch,)`, fractional ones among them.
        scheduler ([`VSDMScheduler`]): The process and its prior.
        sample: Data in model units, `(batch, *event_shape)`.
        num_times: Network calls for each sample.
        generator: Of the times and of the noise.

    Raises:
        ValueError: There is no signal at the last training time (zero terminal SNR), or no time was asked for.
        FloatingPointError: The score is not finite.
    """
    table = scheduler.integrated_beta
    if num_times < 1:
        raise ValueError(f"`num_times` must be at least 1, got {num_times}.")
    if not torch.isfinite(table[-1]):
        raise ValueError("The process has no signal at its last training time, and no bound: its log-SNR is infinite.")
    n, device = len(sample), sample.device
    basis, prior = scheduler.basis(sample), scheduler.prior()

    start = torch.rand(n, generator=generator, device=getattr(generator, "device", "cpu")).cpu().double()
    matching = torch.zeros(n, dtype=torch.float64)
    for i in range(num_times):
        g, inverse_density = draw_times((start + i / num_times) % 1, scheduler.mean_lambda, table[0], table[-1])
        k = training_time_at(g, table).to(device, torch.float32)
        noise = randn_tensor(sample.shape, generator=generator, device=device, dtype=sample.dtype)
        _, s = scheduler.marginal_scales(sample, k)
        wrong = basis.to_basis(score(scheduler.add_noise(sample, noise, k), k)) + basis.to_basis(noise) / s
        if not torch.isfinite(wrong).all():
            raise FloatingPointError("The score is not finite.")
        matching += 0.5 * wrong.square().flatten(1).sum(1).cpu().double() * inverse_density / num_times

    a, s = (scale[0].cpu().double() for scale in scheduler.marginal_scales(sample, len(table) - 1))
    prior_loss = prior.divergence_from(a * prior.basis.to_basis(sample.cpu().double()), s)
    a, s = (scale[0].cpu().double() for scale in scheduler.marginal_scales(sample, 0))
    widths = (s / a).expand(sample.shape[1:])
    reconstruction = 0.5 * (1 + math.log(2 * math.pi)) * widths.numel() + widths.log().sum()
    return LikelihoodBound(prior_loss, matching, reconstruction.expand(n))
