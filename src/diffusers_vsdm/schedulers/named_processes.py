"""Schedulers of processes that have a name: the paper's, EDM's, and Brownian motion between two data sets."""

from typing import Any, Self

import torch

from .. import process


class NamedProcesses:
    """Base of schedulers that are made from a table of betas or sigmas."""

    @classmethod
    def from_power_law(
        cls,
        beta_min: float = 0.1,
        beta_max: float = 10.0,
        power: float = 1.7,
        num_train_timesteps: int = 100,
        **kwargs: Any,
    ) -> Self:
        r"""A scheduler with the paper's $\beta_t = \beta_{min} + t^r (\beta_{max} - \beta_{min})$, t in [0, 1].

        The table is stored as `trained_betas`, which every stock scheduler understands.

        Args:
            beta_min, beta_max (`float`): Rates per unit of time, 0 < beta_min <= beta_max.
            power (`float`, defaults to 1.7): The exponent r, not negative.
            num_train_timesteps (`int`, defaults to 100): Training times N.
            kwargs: Other arguments of the class. Here `clip_sample` defaults to False and `timestep_spacing` to
                `"trailing"`, which starts at t = 1 whatever the number of steps.
        """
        if not 0 < beta_min <= beta_max or not power >= 0:
            raise ValueError(
                "The power law needs 0 < beta_min <= beta_max and power >= 0, got"
                f" beta_min={beta_min}, beta_max={beta_max}, power={power}."
            )
        t = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        g = process.power_law_integrated_beta(t, beta_min, beta_max, power)
        betas = process.discrete_betas(g).tolist()
        return cls._of(kwargs, timestep_spacing="trailing", trained_betas=betas)

    @classmethod
    def from_variance_exploding(
        cls,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        num_train_timesteps: int = 1000,
        **kwargs: Any,
    ) -> Self:
        r"""A scheduler with the forward process of EDM, $x_t = x_0 + \sigma_t \epsilon$ (Karras et al. 2022).

        The training times are spaced by their Eq. 5, from `sigma_min` at k = 0 to `sigma_max` at k = N - 1. Stock
        schedulers do not know such a table.

        Args:
            sigma_min, sigma_max (`float`): Standard deviations of the noise, 0 < sigma_min < sigma_max.
            rho (`float`, defaults to 7.0): The exponent of the spacing, positive.
            num_train_timesteps (`int`, defaults to 1000): Training times N, two or more.
            kwargs: Other arguments of the class. Here `clip_sample` defaults to False and `timestep_spacing` to
                `"linspace"`: n steps visit the whole times nearest to those of EDM's sampler with this rho, from
                `sigma_max` to `sigma_min`, and then the data. With rho 7 `time_grid="karras"` visits them exactly.
        """
        if not 0 < sigma_min < sigma_max or not rho > 0 or num_train_timesteps < 2:
            raise ValueError(
                "The variance-exploding process needs 0 < sigma_min < sigma_max, rho > 0 and two training times or"
                f" more, got sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho},"
                f" num_train_timesteps={num_train_timesteps}."
            )
        t = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
        sigmas = process.karras_sigma(t, sigma_min, sigma_max, rho).tolist()
        sigmas[0], sigmas[-1] = float(sigma_min), float(sigma_max)  # to the last bit
        return cls._of(kwargs, timestep_spacing="linspace", trained_sigmas=sigmas)

    @classmethod
    def from_brownian(cls, sigma_max: float = 1.0, num_train_timesteps: int = 1000, **kwargs: Any) -> Self:
        r"""A scheduler for bridges between two data sets: Brownian motion of variance `sigma_max`^2 from end to end.

        Its training times lie close together at both ends ([`process.brownian_sigma`]), so that the noise of single
        steps blurs neither of the data sets.

        Args:
            sigma_max (`float`, defaults to 1.0): Standard deviation at the last training time, in model units.
            num_train_timesteps (`int`, defaults to 1000): Training times N, two or more.
            kwargs: As in [`from_variance_exploding`].
        """
        if not sigma_max > 0 or num_train_timesteps < 2:
            raise ValueError(
                "The Brownian process needs sigma_max > 0 and two training times or more, got"
                f" sigma_max={sigma_max}, num_train_timesteps={num_train_timesteps}."
            )
        t = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        sigmas = process.brownian_sigma(t, sigma_max).tolist()
        return cls._of(kwargs, timestep_spacing="linspace", trained_sigmas=sigmas)

    @classmethod
    def _of(cls, given: dict[str, Any], timestep_spacing: str, **table: list[float]) -> Self:
        """With one table, and defaults for what is not given."""
        (entries,) = table.values()
        settings = {"clip_sample": False, "timestep_spacing": timestep_spacing} | given
        make: Any = cls
        return make(num_train_timesteps=len(entries), **table, **settings)
