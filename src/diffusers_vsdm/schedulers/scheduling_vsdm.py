"""`VSDMScheduler`: the process, its drift and its solvers behind the contract of Diffusers' schedulers."""

import collections
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import process
from ..bases import Basis, IdentityBasis
from ..solvers import SOLVERS
from .forward_process import ForwardProcess, at_least_float32, check_agree
from .grids import SPACINGS, TIME_GRIDS, continuous_grid, custom_grid, inference_grid
from .marginals import log_sigma
from .named_processes import NamedProcesses
from .noise_table import BETA_SCHEDULES, table_of_betas, table_of_sigmas
from .parameterization import PARAMETERIZATIONS
from .prior import GaussianPrior
from .tables import LEARNED, VARIANCE_TYPES, Call, clipped, combine, learned_std, make_calls


logger = logging.get_logger(__name__)

PRIORS = ("conditional", "marginal", "standard")
FINAL_SIGMAS = ("zero", "sigma_min")
MOST_ROUNDING = 0.1  # of a sample
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class VSDMSchedulerOutput(BaseOutput):
    """Output of [`VSDMScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, *event_shape)`): The sample at the next, less noisy time.
        pred_original_sample (`torch.Tensor` of the same shape): The predicted data, after clipping.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class VSDMScheduler(NamedProcesses, ForwardProcess):
    r"""Scheduler of variational Schrödinger diffusion models: an Ornstein-Uhlenbeck process, a rate per dimension.

    It takes every argument of [`~diffusers.DDPMScheduler`] with the same meaning, so that
    `VSDMScheduler.from_config(pipe.scheduler.config)` works in existing code; without a drift, or with a neutral
    one, it gives that scheduler's samples up to the latter's float32 rounding. Times are integer training steps:
    index k of N means t = (k + 1) / N in [0, 1].

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: The table of
            betas, as in `DDPMScheduler`; it fixes $g_k = -\log \bar\alpha_k$. See also [`from_power_law`].
        trained_sigmas (`list[float]`, *optional*): A table of standard deviations, rising, instead of one of betas:
            the variance-exploding process, $g_k = \sigma_k^2$, and $\lambda = 0$ where there is no drift. See
            [`from_variance_exploding`].
        variance_type (`str`, defaults to `"fixed_small"`): Variance of the `ddpm` solver's noise.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: Clipping of the
            predicted data, as in `DDPMScheduler`; solvers that step by the predicted noise alone (`euler`, `heun`,
            `euler-maruyama`) are not changed by it.
        prediction_type (`str`, defaults to `"epsilon"`): `epsilon`, `sample`, `score`, `v_prediction`
            ($v = a \epsilon - s x_0$) or `edm`, the preconditioning of Karras et al. (2022).
        timestep_spacing, steps_offset: As in `DDPMScheduler`.
        solver (`str`, defaults to `"ddpm"`): Key of [`SOLVERS`]. It is never inferred from a foreign configuration.
        solver_order (`int`, defaults to 2): Predictions that the multistep solvers use: 1 to 3 for `dpmsolver++` and
            `unipc`, 1 or 2 for `sde-dpmsolver++`, 1 to 4 for `deis` and `ipndm`. The first steps use what there is,
            and but for the last two the last ones of a run of few steps use fewer. Other solvers have an order of
            their own.
        time_grid (`str`, *optional*): Times of a run: whole ones by `timestep_spacing` (`"spacing"`), or fractional
            ones, uniform in the root of k (`"quadratic"`), by Karras et al. (`"karras"`), or uniform in the log-SNR.
            The latter two go by the mean of the dimensions' log-SNRs; `"log_snr_mean"`, `"log_snr_largest"` and
            `"log_snr_smallest"` say which one. Defaults to the solver's own: `"quadratic"` for `trig` and
            `trig-fitted`, else `"spacing"`.
        prior_type (`str`, defaults to `"conditional"`): Law of the first sample: `"conditional"` $N(0, s_T^2)$, the
            law of $x_T$ given $x_0 = 0$; `"marginal"` $N(a_T m, a_T^2 v + s_T^2)$ with the drift's moments of the
            data; or `"standard"` N(0, I) for whatever process, as bridges have it. Without a drift `"conditional"` is
            N(0, I) too, as for stock schedulers, or $N(0, \sigma_T^2)$ with a table of sigmas.
        final_sigmas_type (`str`, defaults to `"zero"`): Whether sampling ends at the data (`"zero"`) or at the first
            training time (`"sigma_min"`).
        sigma_data (`float`, *optional*): Standard deviation of the data for `edm`. Defaults to the root of $E x_0^2$
            of each dimension, by the drift's moments, and without a drift to 0.5.
        drift_sha256 (`str`, *optional*): Digest of the drift that belongs to this configuration; written by the
            scheduler itself. See [`set_drift`].

    References:
        Deng et al. (2024), "Variational Schrödinger Diffusion Models", ICML.
        Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps are Flawed".
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]  # has no betas
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        solver: str = "ddpm",
        solver_order: int = 2,
        time_grid: str | None = None,
        prior_type: str = "conditional",
        final_sigmas_type: str = "zero",
        sigma_data: float | None = None,
        drift_sha256: str | None = None,
        trained_sigmas: np.ndarray | list[float] | None = None,
    ):
        choices = {
            "beta_schedule": (beta_schedule, BETA_SCHEDULES),
            "prediction_type": (prediction_type, tuple(PARAMETERIZATIONS)),
            "timestep_spacing": (timestep_spacing, tuple(SPACINGS)),
            "solver": (solver, tuple(SOLVERS)),
            "time_grid": (time_grid, (None, *TIME_GRIDS)),
            "prior_type": (prior_type, PRIORS),
            "final_sigmas_type": (final_sigmas_type, FINAL_SIGMAS),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
        if sigma_data is not None and not sigma_data > 0:
            raise ValueError(f"`sigma_data` must be positive or None, got {sigma_data}.")
        # where DDPMScheduler takes anything, so does this class, but says so
        if variance_type not in VARIANCE_TYPES:
            logger.warning(f"`variance_type` {variance_type!r} is none of {VARIANCE_TYPES}: taken as 'fixed_small'.")
        if trained_sigmas is not None and (trained_betas is not None or rescale_betas_zero_snr):
            raise ValueError(
                "`trained_sigmas` is a table of its own: pass `trained_betas=None` and"
                " `rescale_betas_zero_snr=False` with it."
            )
        for name, table in (("trained_betas", trained_betas), ("trained_sigmas", trained_sigmas)):
            if table is not None and len(table) != num_train_timesteps:
                logger.warning(
                    f"`{name}` has {len(table)} entries and `num_train_timesteps` is {num_train_timesteps}:"
                    " the table counts."
                )
                num_train_timesteps = len(table)
        if trained_sigmas is None:
            noise = table_of_betas(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )
        else:
            noise = table_of_sigmas(trained_sigmas)
        self.integrated_beta, self.betas, self.alphas_cumprod = noise

        self._solver = SOLVERS[solver]
        rule = self._solver.rule(solver_order)
        self.order = self._solver.calls_per_step
        self.set_drift(None)
        self._prior_was_used = False
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._first_index = 0
        self._held: Tensor | None = None
        self._history: collections.deque[Tensor] = collections.deque(maxlen=rule.history)
        self.num_inference_steps: int | None = None
        self._set_grid(
            np.arange(num_train_timesteps - 1, -2, -1) if self._to_data else np.arange(num_train_timesteps)[::-1]
        )

    # State ---------------------------------------------------------------------------------------------------

    @property
    def _to_data(self) -> bool:
        return self._internal_dict["final_sigmas_type"] == "zero"

    def _lambda_of_step(self) -> tuple[Tensor, Tensor]:
        """Lambda, and the data's variance where the solver uses it: scalars, or both with the event's dimensions."""
        lam = self._lambda_for_network()
        if self._drift is None or not self._solver.uses_moments:
            return lam, torch.ones_like(lam)
        variance = self._drift.data_variance
        one = variance.flatten()[0]
        # a mean has its basis too
        if lam.ndim == 0 and (variance == one).all() and not self._drift.data_mean.any():
            return lam, one
        return lam.reshape(lam.shape or [1] * variance.ndim), variance

    def _log_sigma(self, kind: str) -> np.ndarray:
        """log(s/a) at every training time: one number for all dimensions, as the time grid says."""
        reduce = {"log_snr_largest": torch.amax, "log_snr_smallest": torch.amin}.get(kind, torch.mean)
        return self._cached(("log_sigma", kind), lambda: log_sigma(self._process(), reduce))

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the first sample, for pipelines that start from `randn * init_noise_sigma`.

        1 with the `"standard"` prior, and without a drift, as in `DDPMScheduler`; sigma with a table of sigmas and no
        drift. Such a pipeline has no place for the prior's mean: see [`sample_prior`].
        """
        self._prior_was_used = True
        if self._prior_is_standard:
            return 1.0
        if self._drift is None:
            return float(self._process().scales(self._grid[:1])[1])
        std = self.prior(timestep=self._grid[0]).std
        if self._drift.config["basis"] != "identity":
            std = std.square().mean().sqrt()  # a pipeline multiplies pixels
        return std.to(self.timesteps.device, torch.float32)

    @property
    def _starts_as_stock(self) -> bool:
        """Whether stock pipelines, which start from N(0, I), start where this process ends."""
        is_neutral = not self.is_variance_exploding and (self._drift is None or self._drift.is_neutral)
        return self._prior_is_standard or is_neutral

    @property
    def _prior_is_standard(self) -> bool:
        """Whether it is N(0, I) whatever the process; without a drift stock schedulers start there."""
        is_stock = self._drift is None and not self.is_variance_exploding
        return is_stock or self._internal_dict["prior_type"] == "standard"

    @property
    def step_index(self) -> int | None:
        """Index in `timesteps` of the next call; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, set by [`set_begin_index`]."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of `timesteps` and count from there, instead of looking every timestep up.

        Raises:
            ValueError: No step starts there: it is past the end, or in the middle of a step with several calls.
        """
        starts = range(0, len(self.timesteps), self.order)
        if begin_index not in starts:
            raise ValueError(f"`begin_index` must be where a step starts, in {starts}, got {begin_index}.")
        self._begin_index = begin_index
        self._forget()

    def _forget(self) -> None:
        """Before a run: no step was taken."""
        self._step_index = self._held = None
        self._history.clear()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the training times of a sampling run, and make its tables.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps. Solvers with several network calls in a step
                (`heun`) make `calls_per_step * num_inference_steps - 1` calls, and repeat timesteps accordingly.
            device (`str` or `torch.device`, *optional*): Where to put `timesteps`.
            timesteps (`list[int]` or `list[float]`, *optional*): The times themselves, falling, instead of a number.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass exactly one of `num_inference_steps` and `timesteps`.")
        config = self._internal_dict
        kind = config["time_grid"] or self._solver.time_grid
        if num_inference_steps is not None and num_inference_steps != int(num_inference_steps):
            raise ValueError(f"`num_inference_steps` must be a whole number, got {num_inference_steps}.")
        if num_inference_steps is None:
            grid = custom_grid(np.asarray(timesteps), len(self), self._to_data)
        elif kind != "spacing":
            grid = continuous_grid(kind, num_inference_steps, self._log_sigma(kind), self._to_data)
        else:
            grid = inference_grid(
                num_inference_steps, len(self), config["timestep_spacing"], config["steps_offset"], self._to_data
            )
        self.num_inference_steps = len(grid) - 1
        self._set_grid(grid, device)

    def _set_grid(self, grid: np.ndarray, device: str | torch.device | None = None) -> None:
        self._grid = grid
        calls = self._solver.calls_per_step
        visited = np.repeat(grid[:-1], calls)[calls - 1 :]
        whole = np.issubdtype(grid.dtype, np.integer)
        self.timesteps = torch.from_numpy(visited if whole else visited.astype(np.float32)).to(device)
        # the last position of a repeated time is where a step starts
        self._positions = {float(k): i for i, k in enumerate(visited)}
        self._visited = visited.tolist()
        self._begin_index = None
        self._forget()
        for key in [key for key in self._caches if isinstance(key, tuple) and key[0] == "calls"]:
            del self._caches[key]

    def index_for_timestep(self, timestep: int | Tensor) -> int:
        """Position in `timesteps` at which a step from `timestep` starts."""
        k = float(timestep)
        if k not in self._positions:
            raise ValueError(
                f"`timestep` {k:g} is not one of this run's timesteps, from {self._visited[0]} to"
                f" {self._visited[-1]}: take it from `scheduler.timesteps`, or call `set_timesteps` first."
            )
        return self._positions[k]

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The training time that a step from `timestep` arrives at, as a scalar; -1 is the data."""
        position = self.index_for_timestep(timestep)
        return torch.as_tensor(self._grid[(position + self.order - 1) // self.order + 1])

    def _next_index(self, timestep: int | Tensor) -> int:
        """Index of the row for this call; counts where it can, looks up where calls may come in any order."""
        if self._step_index is None:
            first = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if first is None else first
            # a multistep solver knows nothing of the steps before
            self._first_index = self._step_index if self._solver.multistep else 0
        elif self._begin_index is None and self._solver.calls_per_step == 1 and not self._solver.multistep:
            self._step_index = self.index_for_timestep(timestep)
        if self._step_index >= len(self.timesteps):
            raise ValueError(
                f"`step` was called more often than the {len(self.timesteps)} times of this run: call `set_timesteps`"
                " before the next one."
            )
        expected = self._visited[self._step_index]
        # a look at a tensor elsewhere would wait for the device
        on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if on_host and float(timestep) != expected:
            raise ValueError(f"`timestep` {float(timestep):g} is out of turn: the next one of this run is {expected}.")
        return self._step_index

    def _calls(self, device: torch.device, dtype: torch.dtype) -> list[Call]:
        """The calls of this run for samples of this type and place, made at the first step after a change."""

        def make() -> list[Call]:
            config, (lam, data_variance) = self._internal_dict, self._lambda_of_step()
            g, scale = self._process().at(self._grid[self._first_index :])
            ones = [1] * (lam.ndim - self._process().lam.ndim)
            g, scale = (x.reshape(*x.shape, *ones) for x in (g, scale))
            rule = (self._solver, config["solver_order"], self.parameterization)
            calls = make_calls(*rule, lam, g, scale, data_variance, config["variance_type"], device, dtype)
            signal = float(self._process().scales(self._grid[self._first_index : self._first_index + 1])[0].min())
            by_noise = calls[0].is_defined and calls[0].eps and "x0" not in calls[0].terms
            if by_noise and signal < torch.finfo(dtype).eps / MOST_ROUNDING:
                warnings.warn(
                    f"`solver` {config['solver']!r} steps by the predicted noise, and the least signal at the start is"
                    f" {signal:.1g}: rounding grows by its inverse. Use 'dpmsolver++', 'unipc', 'trig-fitted', 'ddim'"
                    " or 'ddpm', or a smaller lambda * g.",
                    stacklevel=5,  # whoever calls `step`
                )
            return calls

        return self._cached(("calls", device, dtype, self._first_index), make)

    # Sampling ------------------------------------------------------------------------------------------------

    def prior(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
        timestep: int | float | None = None,
    ) -> GaussianPrior:
        """The law of the first sample (`prior_type`).

        Args:
            device, dtype: Of its tensors.
            timestep (`int` or `float`, *optional*): The training time that it stands at. Defaults to the last one.
        """
        lam, drift = self._process().lam, self._drift
        at = np.array([len(self) - 1 if timestep is None else timestep])
        g, scale = (x[0] for x in self._process().at(at))
        factor = None
        if self._internal_dict["prior_type"] == "marginal":
            if drift is None:
                raise ValueError(
                    "`prior_type` 'marginal' needs the data's moments: see `fit_moments` and `set_drift`, or choose"
                    " `prior_type='conditional'`."
                )
            mean, variance = process.marginal_moments(lam, g, drift.data_mean, drift.data_variance)
            mean, std = scale * mean, scale * variance.sqrt()
            if drift.turns:  # the data's own axes need not be the drift's
                a, s = (scale[0].expand(drift.event_shape) for scale in self._process().scales(at))
                factor = torch.linalg.cholesky(torch.outer(a, a) * drift.data_covariance + torch.diag(s**2))
        else:
            std = torch.ones_like(lam) if self._prior_is_standard else scale * process.std(lam, g)
            mean = torch.zeros_like(std)
        basis = IdentityBasis() if drift is None else drift.basis(device, dtype)
        place = torch.device(device), dtype
        return GaussianPrior(mean.to(*place), std.to(*place), basis, factor if factor is None else factor.to(*place))

    def sample_prior(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw the first sample of a run from the prior (`prior_type`) at the first of `timesteps`.

        Stable Diffusion's pipelines and others multiply the `latents` they are given by [`init_noise_sigma`]: to these
        pass `scheduler.sample_prior(shape) / scheduler.init_noise_sigma`.

        Args:
            shape (`tuple[int, ...]`): `(batch, *event_shape)`.
            generator (`torch.Generator` or a list of them, *optional*): As in Diffusers' `randn_tensor`.
            device, dtype: Of the result.
        """
        noise = randn_tensor(tuple(shape), generator=generator, device=torch.device(device or "cpu"), dtype=dtype)
        self._check_event(noise, "shape")
        self._prior_was_used = True
        exact = at_least_float32(dtype)
        return self.prior(noise.device, exact, self._grid[0]).sample(noise.to(exact)).to(dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> VSDMSchedulerOutput | tuple[Tensor, Tensor]:
        r"""One call's worth of the backward process: from `timestep` to the next of `timesteps`.

        Args:
            model_output (`Tensor`): The network's output at (`sample`, `timestep`), `(batch, *event_shape)`; with a
                learned variance, twice the channels.
            timestep (`int`, `float` or `Tensor`): Training step, one of `timesteps`.
            sample (`Tensor`): The current $x_t$, `(batch, *event_shape)`.
            generator (`torch.Generator` or a list of them, *optional*): For stochastic solvers.
            return_dict (`bool`, defaults to `True`): Whether to return a [`VSDMSchedulerOutput`] or a tuple.

        Raises:
            ValueError: The timestep is not one of this run's, `step` is called too often, or shapes or
                devices disagree. Types may differ: the result has the sample's.
        """
        self._check_event(sample)
        model_output, predicted_variance = self._split_variance(model_output, sample)
        check_agree(model_output=model_output, sample=sample)
        dtype, noise_dtype = sample.dtype, model_output.dtype
        computed_in = at_least_float32(dtype)
        sample, model_output = sample.to(computed_in), model_output.to(computed_in)
        index = self._next_index(timestep)
        if index == 0 and not self._prior_was_used and not self._starts_as_stock:
            self._prior_was_used = True
            warnings.warn(
                "This run starts from noise that did not come from this process's prior: the caller used neither"
                " `init_noise_sigma` nor `sample_prior`. Use VSDMPipeline, or pass `latents` drawn by `sample_prior`.",
                stacklevel=2,
            )
        call = self._calls(sample.device, sample.dtype)[index - self._first_index]
        if not call.is_defined:
            raise ValueError(
                f"`timestep` {float(timestep):g} has no signal left (zero terminal SNR, or lambda * g too large):"
                f" there `prediction_type` {self._internal_dict['prediction_type']!r} with `solver`"
                f" {self._internal_dict['solver']!r} is undefined: use 'v_prediction' or 'sample', and 'ddpm', 'ddim',"
                " 'dpmsolver++', 'unipc' or 'trig'."
            )
        basis = self._basis(sample, self._cached("lambda_of_step", self._lambda_of_step)[0])
        sample, model_output = basis.to_basis(sample), basis.to_basis(model_output)
        values, prediction = self._predictions(call, basis, sample, model_output)
        terms = call.terms
        if "noise" in terms and self._grid[index] > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=noise_dtype)
            values["noise"] = basis.to_basis(noise.to(sample.dtype))
            if predicted_variance is not None and self._solver.samples_posterior:
                if not isinstance(basis, IdentityBasis):
                    raise ValueError("`variance_type` 'learned...' is per pixel: it has no meaning in another basis.")
                std = learned_std(self._internal_dict["variance_type"], predicted_variance, *call.log_variance)
                terms = terms | {"noise": std}
        previous = combine(terms, values)
        self._held = combine(call.hold, values) if call.hold else None
        previous, prediction = basis.from_basis(previous).to(dtype), prediction.to(dtype)

        self._step_index = index + 1
        if not return_dict:
            return (previous, prediction)
        return VSDMSchedulerOutput(prev_sample=previous, pred_original_sample=prediction)

    def _predictions(
        self, call: Call, basis: Basis, sample: Tensor, model_output: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What a step is made of, by the names in its coefficients, and the predicted data as samples are."""
        values = {"sample": sample, "output": model_output}
        values["x0"] = combine(call.x0, values)
        prediction = basis.from_basis(values["x0"])
        config = self._internal_dict
        if config["clip_sample"] or config["thresholding"]:
            prediction = clipped(prediction, config)
            values["x0"] = basis.to_basis(prediction)
        if call.eps:
            values["eps"] = combine(call.eps, values)
        if self._held is not None:
            values["held"] = self._held
        if call.velocity:
            if (drift := self._drift) is not None:
                key = ("mean", sample.device, sample.dtype)
                values["mean"] = self._cached(key, lambda: drift.data_mean.to(sample.device, sample.dtype))
            values["velocity"] = combine(call.velocity, values)
        if self._solver.multistep:
            latest = call.extrapolated
            for j, older in enumerate(self._history, 1):
                values[f"{latest}_{j}"] = older
            self._history.appendleft(values[latest])
        return values, prediction

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """What `DDPMScheduler` gives by this name, which others ask for: of the `ddpm` step from `t` the variance, its
        root for `fixed_small_log`, and its logarithm for `fixed_large_log` and `learned_range`.
        """
        lam, kind = self._process().lam, variance_type or self._internal_dict["variance_type"]
        g, scale = self._process().at(np.array([float(t), float(self.previous_timestep(t))]))
        small = (scale[1] ** 2 * process.posterior(lam, *g)[2]).clamp(min=1e-20).float()
        large = (scale[1] ** 2 * process.variance(lam, g[0] - g[1])).float()
        if kind in LEARNED and predicted_variance is not None:
            if kind == "learned":
                return predicted_variance
            return 2 * learned_std(kind, predicted_variance, small.log(), large.log()).log()
        others = {"fixed_small_log": small.sqrt(), "fixed_large": large, "fixed_large_log": large.log()}
        return others.get(kind, small)
