r"""The noise of a process at its training times: a table of betas, as in `DDPMScheduler`, or of sigmas, as in EDM.

Both fix $g_k$, the integrated $\beta$. A table of betas goes with the neutral rate $\lambda = 1$, where
$\bar\alpha_k = e^{-g_k}$, and a table of sigmas with $\lambda = 0$, where $\sigma_k^2 = g_k$.

References:
    Ho et al. (2020), "Denoising Diffusion Probabilistic Models".
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", Eq. 5.
"""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .. import process


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


class NoiseTable(NamedTuple):
    r"""What a scheduler knows of its noise.

    Attributes:
        integrated_beta: $g_k$, `(N,)` in float64.
        betas, alphas_cumprod: As in `DDPMScheduler`, `(N,)` in float32; of a table of sigmas those of the
            variance-preserving process with the same signal-to-noise ratios, $\bar\alpha = 1 / (1 + \sigma^2)$.
    """

    integrated_beta: Tensor
    betas: Tensor
    alphas_cumprod: Tensor


def table_of_betas(**settings: Any) -> NoiseTable:
    """The table that `DDPMScheduler` makes of these arguments.

    Raises:
        ValueError: A beta lies outside (0, 1); the last one may be 1.
    """
    # Diffusers' own tables, so that they are the same to the last bit
    betas = DDPMScheduler(**settings).betas
    if not ((betas > 0) & (betas <= 1)).all() or (betas[:-1] == 1).any():
        raise ValueError("The betas must lie in (0, 1); only the last may be 1 (zero terminal SNR).")
    g = process.integrated_beta(betas.double())
    return NoiseTable(g, betas, torch.exp(-g).float())


def table_of_sigmas(sigmas: Sequence[float] | np.ndarray) -> NoiseTable:
    r"""The variance-exploding table with these $\sigma_k$, which rise with k, `(N,)`.

    Raises:
        ValueError: The sigmas are none, not positive and finite, or they do not rise.
    """
    sigma = torch.from_numpy(np.array(sigmas, dtype=np.float64).reshape(-1))
    g = sigma**2
    rises = (sigma > 0).all() and (torch.diff(g, prepend=g.new_zeros(1)) > 0).all()
    if len(g) == 0 or not rises or not torch.isfinite(g).all():
        raise ValueError(
            "`trained_sigmas` must be positive and finite standard deviations that rise, from the least noise to the"
            f" most, got {reprlib.repr(sigma.tolist())}."
        )
    unit, _ = process.at_unit_rate(torch.zeros_like(g), g)
    return NoiseTable(g, process.discrete_betas(unit).float(), torch.exp(-unit).float())
