r"""One-step solvers as coefficients, elementwise in $\lambda$.

`g` and `g_next` are the integrated beta before and after a step, `g_next < g`; data is `g_next = 0`.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", Eq. 17, 18, 22.
    Ho et al. (2020), "Denoising Diffusion Probabilistic Models", Eq. 6, 7.
    Song et al. (2021), "Denoising Diffusion Implicit Models", Eq. 12.
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import process
from .coefficients import Coefficients


def ddpm(lam: Tensor, g: Tensor, g_next: Tensor) -> Coefficients:
    """A sample of the exact posterior [`process.posterior`] at the predicted data."""
    sample, x0, variance = process.posterior(lam, g, g_next)
    return Coefficients(sample=sample, x0=x0, noise=variance.sqrt())


def ddim(lam: Tensor, g: Tensor, g_next: Tensor) -> Coefficients:
    r"""$x_r = a_r \hat x_0 + s_r \hat\epsilon$: exact where $\hat\epsilon$ is constant along the flow of Eq. 18."""
    return Coefficients(x0=process.mean_scale(lam, g_next), eps=process.std(lam, g_next))


def euler(lam: Tensor, g: Tensor, g_next: Tensor) -> Coefficients:
    """Euler's method for the probability flow (Eq. 18) in the clock g."""
    return _explicit_step(process.ode_drift, lam, g, g_next)


def euler_maruyama(lam: Tensor, g: Tensor, g_next: Tensor) -> Coefficients:
    """The Euler-Maruyama method for the backward SDE (Eq. 22, corrected) in the clock g."""
    # the step to the data itself adds no noise to it
    noise = torch.ones_like(lam) * torch.where(g_next > 0, g - g_next, 0.0).sqrt()
    return replace(_explicit_step(process.sde_drift, lam, g, g_next), noise=noise)


def _explicit_step(
    drift: Callable[[Tensor, Tensor, Tensor], Tensor], lam: Tensor, g: Tensor, g_next: Tensor
) -> Coefficients:
    """`x - dg * drift(x)` for a drift that is linear in the sample and in the score."""
    one = torch.ones_like(lam * g)
    on_sample = drift(lam, one, torch.zeros_like(one))
    on_eps = drift(lam, torch.zeros_like(one), process.conditional_score(one, process.std(lam, g)))
    return Coefficients(sample=1 - (g - g_next) * on_sample, eps=-(g - g_next) * on_eps)


def heun(lam: Tensor, g: Tensor, g_next: Tensor) -> Coefficients:
    r"""Heun's method for $d(x/a) / d(s/a) = \hat\epsilon$, the flow of Eq. 18 with its linear part taken out.

    A step is a `ddim` step to $\tilde x_r$, a second call there, and the step again with the mean of both
    $\hat\epsilon$, which is the mean of $\tilde x_r$ and of a step from the held $x_t$ with the second one. The last
    step of the grid is a `ddim` step alone: the network has no value at the data.
    """
    growth = torch.exp(0.5 * lam * (g - g_next))  # a_r / a_t
    slope = process.std(lam, g_next) - growth * process.std(lam, g)  # a_r times the step in s/a
    nothing, half, one = (torch.full_like(growth, value) for value in (0.0, 0.5, 1.0))

    def interleave(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], dim=1).flatten(0, 1)[:-1]

    return Coefficients(
        sample=interleave(growth, half),
        eps=interleave(slope, 0.5 * slope),
        held=interleave(nothing, 0.5 * growth),
        hold=Coefficients(sample=interleave(one, nothing)),
    )
