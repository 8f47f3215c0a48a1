r"""Training objectives.

Denoising score matching (Eq. 16) for the process with one noise level per dimension. Every weighting is a function of
time and dimension that multiplies $|\hat\epsilon - \epsilon|^2$.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", Eq. 16.
    Ho et al. (2020), "Denoising Diffusion Probabilistic Models", Eq. 14: `simple`.
    Song et al. (2021), "Maximum Likelihood Training of Score-Based Diffusion Models": `likelihood`.
    Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy": `min_snr`.
    Kingma et al. (2021), "Variational Diffusion Models": times uniform in the log-SNR.
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models": `log_normal`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import process
from ..bases import IdentityBasis
from ..schedulers import VSDMScheduler


MIN_SNR_GAMMA = 5.0

# (a, s, beta) to the weight of the squared error in eps; `simple` weighs the network's own output by 1 instead
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | None] = {
    "simple": None,
    "epsilon": lambda a, s, beta: torch.ones_like(s),
    "score": lambda a, s, beta: s**-2,
    "likelihood": lambda a, s, beta: beta * s**-2,
    "min_snr": lambda a, s, beta: (MIN_SNR_GAMMA * (s / a) ** 2).clamp(max=1),
}

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # of `log_normal`, by Karras et al. for images in [-1, 1]

# log sigma = log(s / a) at all training times, and twice its growth since the one before, to how often each is drawn
TIME_SAMPLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": lambda log_sigma, growth: torch.ones_like(growth),
    "log_snr": lambda log_sigma, growth: growth,
    "log_normal": lambda log_sigma, growth: (
        growth * (-0.5 * ((log_sigma - LOG_SIGMA_MEAN) / LOG_SIGMA_STD) ** 2).exp()
    ),
}


def time_probabilities(scheduler: VSDMScheduler, sampling: str) -> Tensor:
    r"""How often each training time is drawn, by the process at the mean of all $\lambda$; `(N,)` in float64.

    The loss is not divided by it: the times are part of the objective. Since $d \log(s^2 / a^2) = \beta / s^2 dt$,
    times that are uniform in the log-SNR, with the weighting `epsilon`, are importance sampling of the weighting
    `likelihood` (Song et al. 2021, Eq. 21).

    Args:
        scheduler ([`VSDMScheduler`]): The process.
        sampling (`str`): Key of [`TIME_SAMPLINGS`]: `uniform`, `log_snr` for uniform in the log-SNR, or `log_normal`
            for a normal law of log(s / a), that of Karras et al.

    Raises:
        ValueError: The name is not known, or there is no signal at the last time.
    """
    if sampling not in TIME_SAMPLINGS:
        raise ValueError(f"`time_sampling` must be one of {tuple(TIME_SAMPLINGS)}, got {sampling!r}.")
    g, lam = scheduler.integrated_beta, scheduler.mean_lambda
    growth = torch.diff(g, prepend=g.new_zeros(1)) / process.variance(lam, g)
    density = TIME_SAMPLINGS[sampling](-0.5 * process.log_snr(lam, g), growth)
    if not torch.isfinite(density).all():
        raise ValueError(
            f"`time_sampling` {sampling!r} needs a signal at every time: this table has none at its last."
        )
    return density / density.sum()


def denoising_score_matching(
    scheduler: VSDMScheduler,
    model_output: Tensor,
    sample: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weighting: str = "simple",
    observed: Tensor | None = None,
) -> Tensor:
    r"""Mean weighted squared error of a network's output at $x_t = a_t x_0 + s_t \epsilon$ (Eq. 16).

    Args:
        scheduler ([`VSDMScheduler`]): The process, and what the network predicts.
        model_output (`Tensor`): The network's output at `scheduler.add_noise(sample, noise, timesteps)`.
        sample, noise (`Tensor`): Data $x_0$ and $\epsilon$, `(batch, *event_shape)`.
        timesteps (`Tensor`): Integer training steps, `(batch,)`.
        weighting (`str`, defaults to `"simple"`): Key of [`WEIGHTINGS`]: `simple` (mean squared error of what the
            network predicts), `epsilon` (1), `score` ($1/s^2$: Eq. 16 as printed), `likelihood` ($\beta/s^2$) or
            `min_snr`.
        observed (`Tensor`, *optional*): 1 where the data are known and 0 where they are missing and do not count,
            `(batch, *event_shape)`; for a process in the samples' own coordinates.

    Raises:
        ValueError: Names or shapes do not fit; or data are missing in another basis.

    Returns:
        A scalar.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {tuple(WEIGHTINGS)}, got {weighting!r}.")
    if not model_output.shape == sample.shape == noise.shape:
        raise ValueError(
            f"`model_output` {tuple(model_output.shape)}, `sample` {tuple(sample.shape)} and `noise`"
            f" {tuple(noise.shape)} must have one shape."
        )
    network = scheduler.parameterization
    a, s = scheduler.marginal_scales(sample, timesteps)
    basis = scheduler.basis(s)
    sample, noise, model_output = (basis.to_basis(x.to(s.dtype)) for x in (sample, noise, model_output))
    error = (model_output - network.target(sample, noise, a, s)) ** 2
    if observed is not None:
        if not isinstance(basis, IdentityBasis):
            raise ValueError(
                "`observed` is per dimension: data with missing values need a drift of `basis` 'identity'."
            )
        error = error * observed * (observed.numel() / observed.sum().clamp(min=1))
    weight = WEIGHTINGS[weighting]
    if weight is None:
        return error.mean()
    beta = scheduler.beta_at(timesteps).to(error).reshape(-1, *[1] * (sample.ndim - 1))
    eps_per_unit = network.eps_terms(a, s)[1]
    return (weight(a, s, beta) * eps_per_unit**2 * error).mean()
