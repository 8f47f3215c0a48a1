"""`VSDMPipeline`: samples, images or vectors, of a class if the network knows any, and how likely given ones are."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..likelihood import LEVELS, LogLikelihood, dequantize, flow_log_likelihood
from ..models import MLPModel
from ..models.classes import class_condition, num_classes
from ..normalizer import DataNormalizer
from ..objectives import LikelihoodBound, likelihood_bound
from ..objectives.divergence import MOST_EXACT
from ..schedulers import VSDMScheduler


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ALIGNMENT = 64  # bytes, of torch's CPU allocator


def default_num_steps(scheduler: SchedulerMixin) -> int:
    """Steps of a pipeline that is told none: 50, or as many as the training times allow."""
    return min(50, len(scheduler) - (scheduler.config.get("final_sigmas_type") == "sigma_min"))


@dataclass
class VSDMPipelineOutput(BaseOutput):
    """Output of [`VSDMPipeline`].

    Args:
        samples (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): For vectors `(batch_size, d)` in data
            units; for images PIL images, `(batch_size, height, width, channels)` in numpy or
            `(batch_size, channels, height, width)` in torch, with values in [0, 1].
        trajectory (`torch.Tensor`, *optional*): `(num_steps + 1, batch_size, *event_shape)` in data units, from noise.
    """

    samples: Any
    trajectory: Tensor | None = None

    @property
    def images(self) -> Any:
        """The samples, under the name that Diffusers' image pipelines use."""
        return self.samples


class VSDMPipeline(DiffusionPipeline):
    r"""Generation with a variational Schrödinger diffusion model, unconditional or of a class.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`MLPModel`]): The network; one without a `sample_size` is for vectors. Of
            `num_class_embeds` classes the last one stands for none.
        scheduler ([`VSDMScheduler`] or a stock scheduler): The process, with its drift.
        normalizer ([`DataNormalizer`], *optional*): Maps the model's units back to the data's.
    """

    model_cpu_offload_seq = "unet"
    _exclude_from_cpu_offload = ["normalizer"]  # a few numbers, used outside of any `forward`
    _optional_components = ["normalizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel | MLPModel | ModelMixin,  # `from_pipe` takes over what is of just such a class
        scheduler: SchedulerMixin,
        normalizer: DataNormalizer | None = None,
    ):
        super().__init__()
        self._align(unet)
        self.register_modules(unet=unet, scheduler=scheduler, normalizer=normalizer)
        self._num_timesteps = 0
        self._guidance_scale = 1.0

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Diffusers; a scheduler that cannot go with the network is refused, whenever it comes."""
        if name == "scheduler" and value is not None:
            self._check_scheduler(value)
        super().__setattr__(name, value)

    def _check_scheduler(self, scheduler: SchedulerMixin) -> None:
        for key, what in {"drift_sha256": "a drift", "trained_sigmas": "a table of sigmas"}.items():
            if not isinstance(scheduler, VSDMScheduler) and scheduler.config.get(key) is not None:
                raise ValueError(
                    f"`scheduler` is a {type(scheduler).__name__} whose configuration belongs to {what}, which"
                    " that class cannot use: the network and its noise levels would not match. Use"
                    " `VSDMScheduler.from_config(pipe.scheduler.config, solver=...)`."
                )

    @staticmethod
    def _align(network: ModelMixin) -> None:
        """Make a network that was just loaded sample to the last digit as before it was saved.

        Weights lie in the file's own alignment then, and the matrix kernels of a CPU round by it.
        """
        for parameter in network.parameters():
            if parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()

    @property
    def networks_per_evaluation(self) -> int:
        """Networks that a solver's evaluation calls."""
        return 1

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample: `(d,)` or `(channels, height, width)`."""
        size = self.unet.config.get("sample_size")
        if size is None and "sample_size" in self.unet.config:
            drift = getattr(self.scheduler, "drift", None)
            if drift is None:
                raise ValueError("The network's `sample_size` is None: set it, or pass a scheduler with a drift.")
            return drift.event_shape
        spatial = () if size is None else (size, size) if isinstance(size, int) else tuple(size)
        return (self.unet.config["in_channels"], *spatial)

    @property
    def num_classes(self) -> int | None:
        """Classes that the network knows, the labels 0 to `num_classes - 1`; None for an unconditional one."""
        return num_classes(self.unet)

    @property
    def num_timesteps(self) -> int:
        """Network calls of the current run, for callbacks."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Of the current run; a callback may change `_guidance_scale` while it goes on, as in Diffusers."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step asks the network for samples without a class too."""
        return self._guidance_scale != 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        latents: Tensor | np.ndarray | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        return_trajectory: bool = False,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers
        class_labels: list[int] | Tensor | int | None = None,
        guidance_scale: float = 1.0,
    ) -> VSDMPipelineOutput | tuple:
        r"""Generate samples.

        Args:
            batch_size (`int`, defaults to 1): Number of samples.
            generator (`torch.Generator` or a list of `batch_size` of them, *optional*): For reproducible samples.
            num_inference_steps (`int`, *optional*): Steps of the solver. Defaults to 50, or all training times if
                there are fewer.
            timesteps (`list[int]`, *optional*): The training steps to visit, falling, instead of a number.
            latents (`Tensor` or array, *optional*): The first sample `(batch_size, *event_shape)`, in the model's units,
                instead of a draw from the prior.
            output_type (`str`, *optional*): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the last sample in the model's
                units. Defaults to `"pil"` for images of 1 or 3 channels and `"np"` for all else.
            return_dict (`bool`, defaults to `True`): Whether to return a [`VSDMPipelineOutput`] or a tuple.
            return_trajectory (`bool`, defaults to `False`): Whether to return the path of every sample too.
            callback_on_step_end (`Callable`, *optional*): Called after each network call as `(pipeline, index,
                timestep, tensors)`; may return replacements of the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`): Tensors to pass to it: `latents`.
            class_labels (`list[int]`, `Tensor` or `int`, *optional*): The samples' classes, `(batch_size,)`, or one
                for all. Defaults to samples of no class in particular.
            guidance_scale (`float`, defaults to 1.0): w of classifier-free guidance, by
                $\epsilon_{null} + w (\epsilon_{class} - \epsilon_{null})$ (Ho and Salimans 2022; their w is one less).
                Other values than 1 take a network call of twice the size in each step.

        Returns:
            [`VSDMPipelineOutput`], or the tuple `(samples,)` or `(samples, trajectory)`.

        Raises:
            ValueError: An argument is out of its range, or does not fit the others or the network.
            TypeError: The labels are no whole numbers.
        """
        event_shape, device = self.event_shape, self._execution_device
        is_image = len(event_shape) == 3
        has_colours = is_image and event_shape[0] in (1, 3)
        output_type = output_type or ("pil" if has_colours else "np")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES} or None, got {output_type!r}.")
        if output_type == "pil" and not has_colours:
            raise ValueError(
                f"`output_type='pil'` needs images of 1 or 3 channels, not samples {event_shape}: use 'np'."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but `batch_size` is {batch_size}.")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, not {unknown}."
            )
        shape = (batch_size, *event_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        labels = self._class_labels(class_labels, batch_size)
        self._guidance_scale = guidance_scale
        if self.do_classifier_free_guidance and labels is None:
            raise ValueError(
                f"`guidance_scale` {guidance_scale} guides towards classes, and no `class_labels` are given: pass them,"
                " or leave it at 1."
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be finite, got {guidance_scale}.")

        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError("Pass at most one of `num_inference_steps` and `timesteps`.")
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            if num_inference_steps is None:
                num_inference_steps = default_num_steps(self.scheduler)
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            x = self._first_sample(shape, generator, device)
        else:
            x = torch.as_tensor(latents).to(device, self.unet.dtype)
            _ = self.scheduler.init_noise_sigma  # the prior was the caller's choice

        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        condition = class_condition(self.unet, x, labels)
        without = class_condition(self.unet, x)
        both = {name: torch.cat([without[name], condition[name]]) for name in condition}
        trajectory = [x] if return_trajectory else []
        calls = self.scheduler.timesteps
        self._num_timesteps = len(calls)
        for index, timestep in enumerate(self.progress_bar(calls)):
            if self.do_classifier_free_guidance and labels is not None:
                without_class, of_class = self._network_output(torch.cat([x] * 2), timestep, both).chunk(2)
                # whatever the network predicts, it is affine in eps, and so this guides eps
                output = without_class + self.guidance_scale * (of_class - without_class)
            else:
                output = self._network_output(x, timestep, condition)
            x = self.scheduler.step(output, timestep, x, **step_kwargs, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                x = (callback_on_step_end(self, index, timestep, tensors) or {}).get("latents", x)
            # only whole steps are points of the path
            if return_trajectory and ((index + 1) % self.scheduler.order == 0 or index + 1 == len(calls)):
                trajectory.append(x)

        path = self._to_data_units(torch.stack(trajectory)) if return_trajectory else None
        samples = x if output_type == "latent" else self._as_output(x, output_type)
        self.maybe_free_model_hooks()
        if return_dict:
            return VSDMPipelineOutput(samples=samples, trajectory=path)
        return (samples, path) if return_trajectory else (samples,)

    @torch.inference_mode(False)  # a divergence is a derivative
    def log_likelihood(
        self,
        samples: Tensor | np.ndarray,
        divergence: str | None = None,
        generator: torch.Generator | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        class_labels: list[int] | Tensor | int | None = None,
    ) -> LogLikelihood:
        r"""Log-likelihood of data under the probability flow, the model that the ODE solvers sample from.

        Args:
            samples (`Tensor` or array): `(batch_size, *event_shape)`: vectors in data units, images in [0, 1], or
                images of whole numbers 0 to 255 (`torch.uint8`), which are dequantised.
            divergence (`str`, *optional*): `"exact"`, or an estimate without bias by random directions,
                `"rademacher"` or `"gaussian"`. Defaults to the exact one in up to 256 dimensions, then `"rademacher"`.
            generator (`torch.Generator`, *optional*): Of dequantisation and direction.
            rtol, atol (`float`, defaults to 1e-5): Tolerances of the adaptive solver.
            class_labels (`list[int]`, `Tensor` or `int`, *optional*): Classes given which the samples are how likely,
                as in [`__call__`]. Defaults to no class: the model of all data.

        Returns:
            [`LogLikelihood`], in nats: log-densities in the units of `samples`. Those of whole numbers are a lower
            bound of their log-probabilities; see [`bits_per_dimension`].

        Raises:
            ValueError: Samples of another shape, not finite, or images outside their range; a stock scheduler; labels
                that are not the network's.
            ImportError: torchdiffeq is not installed.
        """
        x, log_volume = self._to_model_units(samples, generator)
        kind = divergence or ("exact" if x[0].numel() <= MOST_EXACT else "rademacher")
        score = functools.partial(self._score, class_labels=self._class_labels(class_labels, len(x)))
        found = flow_log_likelihood(score, self.scheduler, x, kind, generator, rtol, atol)
        self.maybe_free_model_hooks()
        return replace(found, value=found.value + log_volume)

    def likelihood_bound(
        self,
        samples: Tensor | np.ndarray,
        num_times: int = 8,
        generator: torch.Generator | None = None,
        class_labels: list[int] | Tensor | int | None = None,
    ) -> LikelihoodBound:
        r"""An upper bound of the negative log-likelihood under the SDE, another model than that of the ODE.

        Args:
            samples (`Tensor` or array): As in [`log_likelihood`].
            num_times (`int`, defaults to 8): Network calls for each sample.
            generator (`torch.Generator`, *optional*): Of dequantisation, times and noise.
            class_labels (`list[int]`, `Tensor` or `int`, *optional*): As in [`log_likelihood`].

        Returns:
            [`LikelihoodBound`] in nats, in the units of `samples`.

        Raises:
            ValueError: As in [`log_likelihood`].
        """
        x, log_volume = self._to_model_units(samples, generator)
        score = functools.partial(self._score, class_labels=self._class_labels(class_labels, len(x)))
        bound = likelihood_bound(score, self.scheduler, x, num_times, generator)
        self.maybe_free_model_hooks()
        return replace(bound, reconstruction=bound.reconstruction - log_volume)

    def _network_output(self, x: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """What the scheduler steps with."""
        model_input = self.scheduler.scale_model_input(x, timesteps).to(self.unet.dtype)
        return self.unet(model_input, timesteps, **condition, return_dict=False)[0]

    def _score(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        output = self._network_output(x, timesteps, class_condition(self.unet, x, class_labels))
        return self.scheduler.get_score(output.to(x.dtype), timesteps, x)

    def _class_labels(self, class_labels: list[int] | Tensor | int | None, number: int) -> Tensor | None:
        """Classes of `number` samples, `(number,)` on the pipeline's device; None for none."""
        if class_labels is None:
            return None
        if self.num_classes is None:
            raise ValueError("`class_labels` are given, but the network knows of no classes: leave them out.")
        labels = np.asarray(class_labels.cpu() if isinstance(class_labels, Tensor) else class_labels)
        if labels.dtype.kind not in "iu":
            raise TypeError(f"`class_labels` must be whole numbers, got {class_labels!r}.")
        if labels.shape not in ((), (number,)):
            raise ValueError(
                f"`class_labels` must be one, or one for each of the {number} samples, got shape {labels.shape}."
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"`class_labels` must lie in 0 to {self.num_classes - 1}, got {class_labels!r}. (The network's last"
                " embedding is that of samples without a class.)"
            )
        return torch.from_numpy(labels.astype(np.int64)).to(self._execution_device).expand(number)

    def _to_model_units(
        self, samples: Tensor | np.ndarray, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Samples in the network's units, and the log of how much larger a volume is in these: `()` in float64."""
        if not isinstance(self.scheduler, VSDMScheduler):
            raise ValueError(
                f"A likelihood needs a VSDMScheduler, not a {type(self.scheduler).__name__}: use"
                " `VSDMScheduler.from_config(pipe.scheduler.config)`."
            )
        samples = torch.as_tensor(samples)
        samples = samples.clone() if samples.is_inference() else samples  # which cannot be differentiated
        if tuple(samples.shape[1:]) != self.event_shape or len(samples) == 0:
            raise ValueError(f"`samples` must have shape (batch_size, *{self.event_shape}), got {tuple(samples.shape)}.")
        samples, d = samples.to(self._execution_device), math.prod(self.event_shape)
        log_volume = torch.zeros((), dtype=torch.float64)
        if samples.dtype == torch.uint8 and samples.ndim == 4:
            samples, log_volume = dequantize(samples, generator), log_volume - d * math.log(LEVELS)
        x = samples.float()
        if not torch.isfinite(x).all():
            raise ValueError("`samples` holds NaN or infinite values.")
        if x.ndim == 4:
            if x.min() < 0 or x.max() > 1:
                raise ValueError(
                    f"`samples` must be images in [0, 1], or of type torch.uint8, got values from {float(x.min()):g} to"
                    f" {float(x.max()):g}."
                )
            x, log_volume = 2 * x - 1, log_volume + d * math.log(2)
        if self.normalizer is not None:
            normalizer = self.normalizer.to(x.device)
            x = normalizer.normalize(x)
            log_volume = log_volume - normalizer.std.cpu().double().log().expand(self.event_shape).sum()
        return x, log_volume

    def _as_output(self, latents: Tensor, output_type: str) -> Any:
        """Samples in data units, images in [0, 1], as the caller wants them."""
        samples = self._to_data_units(latents)
        is_image = samples.ndim == 4
        if is_image:
            samples = (samples / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return samples
        array = samples.float().cpu().numpy()
        array = np.moveaxis(array, 1, -1) if is_image else array
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _first_sample(self, shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
        if isinstance(self.scheduler, VSDMScheduler):
            return self.scheduler.sample_prior(shape, generator=generator, device=device, dtype=self.unet.dtype)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        return noise * self.scheduler.init_noise_sigma

    def _to_data_units(self, latents: Tensor) -> Tensor:
        return latents if self.normalizer is None else self.normalizer.to(latents.device).denormalize(latents)
