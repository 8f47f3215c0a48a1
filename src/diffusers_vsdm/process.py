r"""The forward process of a variational Schrödinger diffusion model, in closed form.

The multivariate Ornstein-Uhlenbeck process of Eq. 11 with a diagonal, time-invariant drift (Corollary 1) is, in each
coordinate,

$$ dx = -\tfrac12 \lambda \beta_t x \, dt + \sqrt{\beta_t} \, dw , \qquad g_t := \int_0^t \beta_s \, ds , $$

so that $x_t = a_t x_0 + s_t \epsilon$ with

$$ a_t = e^{-\lambda g_t / 2}, \qquad s_t^2 = \int_0^{g_t} e^{-\lambda u} du = (1 - e^{-\lambda g_t}) / \lambda . $$

$\lambda = 1$ is the variance-preserving process of DDPM, with $g_t = -\log \bar\alpha_t$ for any table of betas;
$\lambda = 0$ is the variance-exploding process, $a = 1$ and $s^2 = g$.

Every function here is elementwise and pure. `lam` is $\lambda$ and `g` is the integrated $\beta$ at some time; they
are tensors that broadcast against each other, and the results have the broadcast shape and the promoted type. Times
themselves appear only in the schedules, where $t$ lies in [0, 1].

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", ICML: equation numbers below.
    Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations".
    Ho et al. (2020), "Denoising Diffusion Probabilistic Models".
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models".
"""

import torch
from torch import Tensor


# Schedules: g as a function of time --------------------------------------------------------------------------


def power_law_beta(t: Tensor, beta_min: float, beta_max: float, power: float) -> Tensor:
    r"""$\beta_t = \beta_{min} + t^r (\beta_{max} - \beta_{min})$ for $t \in [0, 1]$, with $r$ the `power`."""
    return beta_min + t**power * (beta_max - beta_min)


def power_law_integrated_beta(t: Tensor, beta_min: float, beta_max: float, power: float) -> Tensor:
    r"""$g_t = \beta_{min} t + (\beta_{max} - \beta_{min}) t^{r+1} / (r+1)$, the integral of [`power_law_beta`]."""
    return beta_min * t + (beta_max - beta_min) * t ** (power + 1) / (power + 1)


def karras_sigma(t: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    r"""$\sigma_t = (\sigma_{min}^{1/\rho} + t (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho}))^\rho$, $t \in [0, 1]$.

    Eq. 5 of Karras et al. (2022), from the least noise to the most; $g_t = \sigma_t^2$ at $\lambda = 0$.
    """
    least, most = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (least + t * (most - least)) ** rho


def brownian_sigma(t: Tensor, sigma_max: float) -> Tensor:
    r"""$\sigma_t = \sigma_{max} \sin(\pi t / 2)$, $t \in [0, 1]$: Brownian motion whose clock is slow at both ends."""
    return sigma_max * torch.sin(0.5 * torch.pi * t)


def integrated_beta(betas: Tensor) -> Tensor:
    r"""$g_k = -\log \bar\alpha_k = -\sum_{j \le k} \log(1 - \beta_j)$ of a discrete DDPM table, shape `(N,)`.

    A final beta of 1 (zero terminal SNR) gives an infinite last entry.
    """
    return -torch.cumsum(torch.log1p(-betas), dim=0)


def discrete_betas(g: Tensor) -> Tensor:
    r"""The DDPM table $\beta_k = 1 - e^{-(g_k - g_{k-1})}$ whose [`integrated_beta`] is `g`, shape `(N,)`."""
    return -torch.expm1(-torch.diff(g, prepend=g.new_zeros(1)))


# Transition: p(x_t | x_0), Eq. 13 to 15 and Corollary 1 ------------------------------------------------------


def mean_scale(lam: Tensor, g: Tensor) -> Tensor:
    r"""$a = e^{-\lambda g / 2}$ (Eq. 13)."""
    # 0 * inf: a variance-exploding process keeps its mean for ever
    return torch.where(lam == 0, 1.0, torch.exp(-0.5 * lam * g))


def variance(lam: Tensor, g: Tensor) -> Tensor:
    r"""$s^2 = (1 - e^{-\lambda g}) / \lambda$, continued by $g$ at $\lambda = 0$ (Eq. 14 for a diagonal drift)."""
    safe = torch.where(lam == 0, 1.0, lam)
    return torch.where(lam == 0, g, -torch.expm1(-safe * g) / safe)


def std(lam: Tensor, g: Tensor) -> Tensor:
    r"""$s$, the square root of [`variance`]; $L_t$ of Eq. 15 for a diagonal drift."""
    return variance(lam, g).sqrt()


def log_snr(lam: Tensor, g: Tensor) -> Tensor:
    r"""$\log(a^2/s^2)$, the logarithm of the signal-to-noise ratio; it falls strictly from infinity at $g = 0$."""
    return torch.where(lam == 0, 0.0, -lam * g) - variance(lam, g).log()


def time_of_log_snr(lam: Tensor, log_snr: Tensor) -> Tensor:
    r"""The $g$ at which [`log_snr`] has this value: $\log(1 + \lambda e^{-\ell}) / \lambda$."""
    safe = torch.where(lam == 0, 1.0, lam)
    noise = torch.exp(-log_snr)
    # log(1 + z) as softplus of log z, which does not overflow
    return torch.where(lam == 0, noise, torch.nn.functional.softplus(safe.log() - log_snr) / safe)


def conditional_score(eps: Tensor, s: Tensor) -> Tensor:
    r"""$\nabla \log p(x_t | x_0) = -\epsilon / s_t$ (Eq. 15); with $\hat\epsilon$ of a network, its score."""
    return -eps / s


# Rates that vary in time -------------------------------------------------------------------------------------


def piecewise_scales(lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\log a_k$ and $s_k^2$ for a rate that is $\lambda_k$ while $g$ goes from $g_{k-1}$ to $g_k$, $g_{-1} = 0$.

    The variance obeys $s_k^2 = e^{-\lambda_k \Delta g} s_{k-1}^2 + (1 - e^{-\lambda_k \Delta g}) / \lambda_k$: the
    matrix exponential of Eq. 14 is for a constant drift.

    Args:
        lam: `(N, *shape)`.
        g: Increasing, `(N,)`.

    Returns:
        Both of shape `(N, *shape)`.
    """
    steps = torch.diff(g, prepend=g.new_zeros(1)).reshape(-1, *[1] * (lam.ndim - 1))
    s2, rows = torch.zeros_like(lam[0]), []
    for rate, step in zip(lam, steps, strict=True):
        s2 = mean_scale(rate, step) ** 2 * s2 + variance(rate, step)
        rows.append(s2)
    return torch.cumsum(torch.where(lam == 0, 0.0, -0.5 * lam * steps), 0), torch.stack(rows)


def at_unit_rate(log_a: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    r"""The process with $\lambda = 1$ that has these signal-to-noise ratios: its $g$, and $c$ with $x_t = c_t y_t$.

    $y$ is that process, $g = \log(1 + s^2 / a^2)$ and $c = \sqrt{a^2 + s^2}$. So a formula for constant rates serves
    any, in the coordinates $x / c$.
    """
    log_noise = s2.log() - 2 * log_a
    return torch.logaddexp(torch.zeros_like(log_noise), log_noise), (torch.exp(2 * log_a) + s2).sqrt()


# Prior -------------------------------------------------------------------------------------------------------


def marginal_moments(lam: Tensor, g: Tensor, data_mean: Tensor, data_variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean $a m$ and variance $a^2 v + s^2$ of $x_t$, for data with mean $m$ and variance $v$ in each dimension."""
    a = mean_scale(lam, g)
    return a * data_mean, a**2 * data_variance + variance(lam, g)


# Reverse time ------------------------------------------------------------------------------------------------


def posterior(lam: Tensor, g: Tensor, g_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The Gaussian $q(x_r | x_t, x_0)$ for $r < t$, with `g` at $t$ and `g_next` at $r$.

    With $a_{t|r}, s_{t|r}$ the transition from $r$ to $t$, its mean is

    $$ \frac{a_{t|r} s_r^2}{s_t^2} x_t + \frac{a_r s_{t|r}^2}{s_t^2} x_0 $$

    and its variance $s_r^2 s_{t|r}^2 / s_t^2$. With $\lambda = 1$ these are Eq. 6 and 7 of Ho et al. (2020).

    Returns:
        The coefficient of $x_t$, the coefficient of $x_0$, and the variance.
    """
    s2, s2_next = variance(lam, g), variance(lam, g_next)
    s2_step = variance(lam, g - g_next)
    return mean_scale(lam, g - g_next) * s2_next / s2, mean_scale(lam, g_next) * s2_step / s2, s2_next * s2_step / s2


def ancestral_step(lam: Tensor, g: Tensor, g_next: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of a backward step of Eq. 17 by the [`posterior`] at the data that the score predicts.

    By Tweedie's formula the mean is $E[x_r | x_t] = (x_t + s_{t|r}^2 \nabla \log p_t(x_t)) / a_{t|r}$, exactly.
    """
    step = g - g_next
    return (x + variance(lam, step) * score) / mean_scale(lam, step), posterior(lam, g, g_next)[2]


def gaussian_posterior_variance(lam: Tensor, g: Tensor, g_next: Tensor, data_variance: Tensor) -> Tensor:
    r"""Variance of $x_r$ given $x_t$ alone, for Gaussian data: the [`posterior`]'s, and what $x_0$ still varies by.

    With it a chain of [`ancestral_step`]s with the score of Gaussian data has the exact law after any number of steps.
    The posterior's own is for data that are a point, and $s_{t|r}^2$ the limit of wide data.
    """
    _, on_x0, least = posterior(lam, g, g_next)
    a2, s2 = mean_scale(lam, g) ** 2, variance(lam, g)
    return least + on_x0**2 * data_variance * s2 / (a2 * data_variance + s2)


def ode_drift(lam: Tensor, x: Tensor, score: Tensor) -> Tensor:
    r"""$-\frac12 (\lambda x + \nabla \log p_t(x))$: the probability flow $dx/dg$ of Eq. 18; $dg = \beta dt$."""
    return -0.5 * (lam * x + score)


def sde_drift(lam: Tensor, x: Tensor, score: Tensor) -> Tensor:
    r"""$-\frac12 \lambda x - \nabla \log p_t(x)$: the drift of the backward SDE (Eq. 17) in the clock $dg = \beta dt$.

    The noise of that SDE has unit variance per unit of $g$, so that an Euler-Maruyama step back by $\Delta g$ is
    `x - dg * sde_drift(...) + sqrt(dg) * xi` (Eq. 22, whose printed form lacks $x_n$ and has the wrong sign).
    """
    return -0.5 * lam * x - score
