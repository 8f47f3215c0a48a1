"""`BridgePipeline`: networks on both sides, SB-FBSDE, sampled as any pipeline is."""

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DModel
from torch import Tensor

from ..bridges.two_sided import TwoSidedProcess
from ..likelihood import LogLikelihood
from ..models import MLPModel
from ..models.classes import class_condition
from ..normalizer import DataNormalizer
from ..objectives import LikelihoodBound
from ..schedulers import VSDMScheduler
from ..solvers import SOLVERS
from .pipeline_vsdm import VSDMPipeline


class BridgePipeline(VSDMPipeline):
    r"""Generation and transport with a learned forward process, see [`TwoSidedProcess`].

    It is called as [`VSDMPipeline`] is. Stochastic solvers take the backward SDE, whose score is $z_b$; the others the
    probability flow, whose score is $z_b - z_f$, in two network calls where that takes one. Without a forward network
    it is the [`VSDMPipeline`] of its parts, so that a trained one converts by
    `BridgePipeline(pipe.unet, pipe.scheduler, pipe.normalizer)`.

    Args:
        unet: The backward network; what it predicts is said by the scheduler, whose score is $z_b$.
        scheduler ([`VSDMScheduler`]): The reference process and, unless `prior` is `"data"`, the prior.
        normalizer ([`DataNormalizer`], *optional*): Maps the model's units back to the data's.
        forward_unet (*optional*): The forward network, $z_f$ in the clock g; None for 0.
        prior (`str`, defaults to `"gaussian"`): `"gaussian"`, the scheduler's; or `"data"`: a bridge between two data
            sets, of which the caller gives one as `latents`.
    """

    model_cpu_offload_seq = "unet->forward_unet"
    _optional_components = ["normalizer", "forward_unet"]
    scheduler: VSDMScheduler

    def __init__(
        self,
        unet: UNet2DModel | MLPModel | ModelMixin,
        scheduler: VSDMScheduler,
        normalizer: DataNormalizer | None = None,
        forward_unet: UNet2DModel | MLPModel | ModelMixin | None = None,
        prior: str = "gaussian",
    ):
        super().__init__(unet, scheduler, normalizer)
        if prior not in ("gaussian", "data"):
            raise ValueError(f"`prior` must be 'gaussian' or 'data', got {prior!r}.")
        if forward_unet is not None:
            self._align(forward_unet)
        self.register_modules(forward_unet=forward_unet)
        self.register_to_config(prior=prior)

    def _check_scheduler(self, scheduler: SchedulerMixin) -> None:
        super()._check_scheduler(scheduler)
        if not isinstance(scheduler, VSDMScheduler):
            raise ValueError(f"`scheduler` must be a VSDMScheduler, got {type(scheduler).__name__}.")

    @property
    def networks_per_evaluation(self) -> int:
        """Two where the probability flow asks both networks."""
        return 1 if self.forward_unet is None or SOLVERS[self.scheduler.config["solver"]].stochastic else 2

    def register_modules(self, **modules: Any) -> None:
        """As in Diffusers; with a forward network the scheduler goes without `clip_sample` and `thresholding`.

        What the flow's score, $z_b - z_f$, predicts is no estimate of the data, and not bounded as they are.
        """
        super().register_modules(**modules)
        config = self.scheduler.config
        if modules.get("forward_unet") is not None and (config["clip_sample"] or config["thresholding"]):
            self.scheduler = VSDMScheduler.from_config(config, clip_sample=False, thresholding=False)

    def process(
        self, num_steps: int | None = None, corrector_steps: int = 0, class_labels: Tensor | None = None
    ) -> TwoSidedProcess:
        """Both directions on a grid of training times, in model units, see [`TwoSidedProcess`].

        Args:
            num_steps, corrector_steps: As there.
            class_labels (`Tensor`, *optional*): Classes for the backward network, `(n,)` of each sample.
        """
        backward = partial(self._backward_policy, class_labels=class_labels)
        return TwoSidedProcess(self.scheduler, self._forward_policy, backward, num_steps, corrector_steps)

    @torch.no_grad()
    def encode(
        self, samples: Tensor | np.ndarray, num_steps: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Carry data to the prior by the forward SDE.

        Args:
            samples (`Tensor` or array): `(batch_size, *event_shape)`: vectors in data units, or images in [0, 1].
            num_steps (`int`, *optional*): Steps; by default all training times.
            generator (`torch.Generator`, *optional*): Of the noise.

        Returns:
            The latents `(batch_size, *event_shape)` in model units, and the paths to them in data units,
            `(num_steps + 1, batch_size, *event_shape)`.
        """
        x, _ = self._to_model_units(samples, generator)
        path, _ = self.process(num_steps).run(x, 1, generator)
        self.maybe_free_model_hooks()
        return path[-1], self._to_data_units(path)

    def log_likelihood(self, samples: Tensor | np.ndarray, *args: Any, **kwargs: Any) -> LogLikelihood:
        """As [`VSDMPipeline.log_likelihood`], of the probability flow of both networks."""
        self._check_prior()
        return super().log_likelihood(samples, *args, **kwargs)

    @torch.no_grad()
    def likelihood_bound(
        self,
        samples: Tensor | np.ndarray,
        num_times: int = 8,
        generator: torch.Generator | None = None,
        class_labels: list[int] | Tensor | int | None = None,
    ) -> LikelihoodBound:
        r"""As [`VSDMPipeline.likelihood_bound`], from simulated forward paths of all training times.

        `prior_loss` is here $-\log \pi(x_T)$, without the entropy of $p_T$ that no one knows, and `drift_matching` the
        log-ratio of the paths' steps; their sum is what bounds.

        Args:
            samples, generator: As there.
            num_times (`int`, defaults to 8): Not used: a path takes the steps that it takes.
            class_labels: As there, for the backward network.
        """
        self._check_prior()
        x, log_volume = self._to_model_units(samples, generator)
        process = self.process(class_labels=self._class_labels(class_labels, len(x)))
        path, _ = process.run(x, 1, generator)
        first, others = (part.cpu().double() for part in process.log_ratio(path))
        prior = -self.scheduler.prior().log_prob(path[-1].cpu().double())
        self.maybe_free_model_hooks()
        return LikelihoodBound(prior_loss=prior, drift_matching=others, reconstruction=first - log_volume)

    def _check_prior(self) -> None:
        if self.config["prior"] == "data":
            raise ValueError("A bridge between two data sets has no likelihood: the prior's density is not known.")

    def _first_sample(self, shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
        if self.config["prior"] == "data":
            raise ValueError("`latents` are missing: this bridge starts from samples of another data set.")
        return super()._first_sample(shape, generator, device)

    def _forward_policy(self, x: Tensor, timesteps: Tensor) -> Tensor:
        if self.forward_unet is None:
            return torch.zeros_like(x)
        network = self.forward_unet
        return network(x.to(network.dtype), timesteps, **class_condition(network, x), return_dict=False)[0].to(x.dtype)

    def _backward_policy(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        output = super()._network_output(x, timesteps, class_condition(self.unet, x, class_labels))
        return self.scheduler.get_score(output.to(x.dtype), timesteps, x)

    def _network_output(self, x: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        output = super()._network_output(x, timesteps, condition)
        if self.networks_per_evaluation == 1:
            return output
        k = timesteps.reshape(-1).to(x.device).expand(len(x))
        return self.scheduler.shift_score(output, -self._forward_policy(x, k), timesteps, x)

    def _score(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Of the probability flow, whatever the solver."""
        return self._backward_policy(x, timesteps, class_labels) - self._forward_policy(x, timesteps)
