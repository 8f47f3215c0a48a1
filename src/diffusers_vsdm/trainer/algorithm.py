"""Algorithm 1 over Accelerate: score matching, and every so often a stage of stochastic approximation.

What is trained, and on what, say the trainers: of images and vectors in `loop.py`, of forecasters in `forecast.py`.
"""

import contextlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from ..normalizer import DataNormalizer
from ..objectives import denoising_score_matching, time_probabilities
from ..pipelines.pipeline_vsdm import default_num_steps
from ..schedulers import VSDMScheduler
from ..stochastic_approximation import StageOutput, StochasticApproximation
from .averaging import averaged
from .checkpoint import (
    check_settings,
    discard,
    find_checkpoint,
    inside,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from .config import RunConfig
from .learner import learner_state, load_learner
from .setup import as_it_is, build_accelerator, build_optimizer, build_scheduler, seed_dropout
from .sharding import is_sharded, whole_network


LOSS_WINDOW = 100
# of the weights that stages simulate with: the raw ones double the noise of the moments, slower ones lag behind lambda
STAGE_EMA_DECAY = 0.99


@dataclass
class TrainingResult:
    r"""What a run leaves behind.

    Attributes:
        pipeline: The trained pipeline, with the averaged weights if there are any.
        lambdas: $\lambda$ at the start and after each stage, shape `(stages + 1, *lambda_shape)`, float64.
        final_loss: Mean loss of the last hundred steps.
        seconds: Wall time of the training loop, over all parts of a resumed run.
        sa_seconds: What of it was spent in stochastic approximation: simulation and update.
        sa_skipped: Stages skipped because their moments were not finite.
        likelihood: What [`measure_likelihood`] says of the model; None if it was not asked.
    """

    pipeline: DiffusionPipeline
    lambdas: Tensor
    final_loss: float
    seconds: float
    sa_seconds: float
    sa_skipped: int
    likelihood: dict[str, Any] | None = None


class _EpochSampler(Sampler):
    """A permutation that depends on seed and epoch alone, so that any point of a run can be found again."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class Draw(NamedTuple):
    """A batch in model units with its noise and times; n is the number of examples.

    Attributes:
        sample, noise: `(n, *event_shape)`.
        timesteps: Training steps, `(n,)`.
        condition: What else the network is told, as keyword arguments of the call.
        observed: 1 where the sample is known and 0 where it is missing, `(n, *event_shape)`; None if all is known.
    """

    sample: Tensor
    noise: Tensor
    timesteps: Tensor
    condition: dict[str, Tensor]
    observed: Tensor | None = None


class BaseTrainer(ABC):
    """One run of Algorithm 1: its parts, its state, and its checkpoints.

    All randomness is keyed by seed and position: the state of a run is its tensors and the number of steps done.

    Args:
        config ([`RunConfig`]): The settings.
        data: Data to train on, instead of those that the settings name.

    Raises:
        ValueError: The data cannot be had or do not fit, or the machine lacks the precision.

    Attributes:
        config: The settings, with the number of steps where epochs were given.
        network, drift, scheduler, normalizer: The model that is trained.
    """

    config: Any

    def __init__(self, config: RunConfig, data: Any = None):
        self.folder = Path(config.output_dir)
        set_seed(config.seed)
        self.accelerator = build_accelerator(config)
        self.config = config = replace(config, mixed_precision=self.accelerator.mixed_precision)
        self.dataset = dataset = self._load(data)
        self.config = config = config.for_data(len(dataset), self.accelerator.num_processes)
        batches = self._moment_batches()
        self.normalizer: DataNormalizer | None = None
        if config.standardize:
            normalizer = DataNormalizer.from_data(
                batches, dataset.event_shape[:1] + (1,) * (len(dataset.event_shape) - 1)
            )
            batches = (normalizer.normalize(batch) for batch in batches)
            self.normalizer = normalizer
        self.scheduler, self.drift = build_scheduler(config, dataset.event_shape, batches, self._pretrained)
        if self.normalizer is not None:
            self.normalizer.to(self.accelerator.device)
        self.samples: Tensor | None = None
        if config.sa_update == "ipf":  # which looks at the forward process too
            samples = next(iter(self._moment_batches()))[: config.sa_trajectories].to(self.accelerator.device)
            self.samples = samples if self.normalizer is None else self.normalizer.normalize(samples)
        self.network = self._build_network()
        self.optimizer = build_optimizer(config, self.network, config.learning_rate, self.accelerator.device)
        # stepped by hand, once for each step of the optimizer, whatever the processes and the accumulation
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.sampler = _EpochSampler(len(dataset), config.seed)
        loader = DataLoader(
            self._examples_dataset(),
            batch_size=config.train_batch_size,
            sampler=self.sampler,
            drop_last=True,
            collate_fn=as_it_is,
            num_workers=config.dataloader_num_workers,
        )
        self.model, self.prepared_optimizer, self.loader = self.accelerator.prepare(
            self.network, self.optimizer, loader
        )
        self.approximation = self._new_approximation() if config.stage_steps else None
        self._check_sampling()
        self.generator = torch.Generator(self.accelerator.device)
        self.ema = self._new_ema(STAGE_EMA_DECAY if config.stage_steps else config.ema_max_decay)
        self.step = 0
        self.lambdas = [self.drift.lam.clone()]
        self._times: tuple[Any, Tensor] | None = None  # their probabilities, and the drift's version
        self.losses = torch.zeros(0, device=self.accelerator.device)
        self.last_loss: Tensor | None = None
        self.seconds = self.sa_seconds = 0.0
        name = config.resume_from_checkpoint
        if name and (checkpoint := find_checkpoint(self.folder, name)) is not None:
            self.load(checkpoint)

    # What is trained ------------------------------------------------------------------------------------------------

    @property
    def _pretrained(self) -> str:
        """A pipeline whose table of betas the process takes."""
        return ""

    @abstractmethod
    def _load(self, data: Any) -> Any:
        """The training set, with `event_shape`, a length and batched access."""

    @abstractmethod
    def _moment_batches(self) -> Iterable[Tensor]:
        """Batches `(n, *event_shape)` to fit moments to."""

    @abstractmethod
    def _build_network(self) -> ModelMixin:
        """The network of a run."""

    @abstractmethod
    def _pipeline(self, network: torch.nn.Module, scheduler: VSDMScheduler) -> DiffusionPipeline:
        """The model as it is sampled from."""

    @abstractmethod
    def _validate(self) -> None:
        """A look at the model as it is, every so often."""

    def _examples_dataset(self) -> Any:
        """What batches are drawn from."""
        return self.dataset

    def _num_examples(self, batch: Any) -> int:
        return len(batch)

    @abstractmethod
    def _examples(self, batch: Any, uniform: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Sample, condition and what is observed of a [`Draw`]; `uniform()` is a number in [0, 1) for each example."""

    @abstractmethod
    def _stage_condition(self, network: torch.nn.Module, x: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
        """What the network is told of simulated samples `x` and of the entries of `_stage_examples` that they have."""

    def _stage_examples(self, network: torch.nn.Module, number: int) -> Tensor | None:
        """A condition for each trajectory of a stage, `(sa_trajectories, ...)`; `number` stages went before it."""
        return None

    def _finish(self, result: TrainingResult) -> TrainingResult:
        """What is measured at the end."""
        return result

    # The algorithm --------------------------------------------------------------------------------------------------

    def train(self) -> TrainingResult:
        """Run to the end; nothing is written but logs and checkpoints.

        Raises:
            FloatingPointError: The loss is no longer finite.
        """
        config = self.config
        if config.logger != "none":
            self.accelerator.init_trackers("vsdm", config=asdict(config))
        if config.overwrite_output_dir and not config.resume_from_checkpoint and self.accelerator.is_main_process:
            for old in list_checkpoints(self.folder):  # of a run that this one replaces
                discard(old)
        batches, stages = self._batches(), config.stage_steps
        bar = tqdm(
            initial=self.step,
            total=config.max_train_steps,
            desc="Training",
            disable=not self.accelerator.is_local_main_process,
            leave=False,
        )
        started = time.perf_counter() - self.seconds
        while self.step < config.max_train_steps:
            self._gradient_step(batches)
            self.step += 1
            if self.approximation is not None and self.step in stages:
                self._stage(self.approximation)
            if self.step == config.adaptive_steps and stages:
                # from here to the end the network meets only the lambda that is saved with it
                self.drift.set_lambda(self.drift.average(config.sa_average))
                self.ema = self._new_ema(config.ema_max_decay)
            bar.update()
            if self.step % config.logging_steps == 0 or self.step == config.max_train_steps:
                self._log(bar)
            if config.validation_steps and self.step % config.validation_steps == 0:
                self._validate()
            self.seconds = time.perf_counter() - started
            if config.checkpointing_steps and self.step % config.checkpointing_steps == 0:
                self.save()
        bar.close()
        self.last_loss = None
        for tracker in self.accelerator.trackers:
            tracker.finish()

        network = self.network
        if is_sharded(network):
            network = whole_network(network, self.ema)
        elif self.ema is not None:
            self.ema.copy_to(network.parameters())
        result = TrainingResult(
            pipeline=self._pipeline(network.eval(), self.scheduler),
            lambdas=torch.stack(self.lambdas),
            final_loss=self.losses.mean().item(),
            seconds=self.seconds,
            sa_seconds=self.sa_seconds,
            sa_skipped=0 if self.approximation is None else self.approximation.num_skipped,
        )
        return self._finish(result)

    def _gradient_step(self, batches: Iterator[tuple[int, Any]]) -> None:
        """Score matching (Eq. 16) on one batch, or on several accumulated."""
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.config.gradient_accumulation_steps):
            index, batch = next(batches)
            with self.accelerator.accumulate(self.model):
                sample, noise, timesteps, condition, observed = self._draw(index, batch)
                noisy = self.scheduler.add_noise(sample, noise, timesteps)
                prediction = self._predict(self.model, noisy, timesteps, condition)
                loss = denoising_score_matching(
                    self.scheduler, prediction, sample, noise, timesteps, self.config.weighting, observed
                )
                # its graph lives until the next forward pass is over: memory that is all free in between goes back to
                # the system, and costs a page fault for every 4 kB when it is asked for again (6% of a step on a CPU)
                self.last_loss = loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
            total += loss.detach() / self.config.gradient_accumulation_steps
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.network.parameters())
        self.losses = torch.cat([self.losses[1 - LOSS_WINDOW :], total[None]])

    def _predict(
        self, network: torch.nn.Module, x: Tensor, timesteps: Tensor | int, condition: dict[str, Tensor]
    ) -> Tensor:
        model_input = self.scheduler.scale_model_input(x, timesteps)
        with self.accelerator.autocast():  # a prepared model has its own
            return network(model_input, timesteps, **condition).sample.float()

    def _draw(self, index: int, batch: Any) -> Draw:
        """The `index`-th batch in model units, its noise and times, and what the network is told.

        Every process draws for the whole batch and keeps its own part, so that their number does not matter.
        """
        number, accelerator, seed = (
            self._num_examples(batch),
            self.accelerator,
            self.config.seed * 1_000_000_007 + index,
        )
        self.generator.manual_seed(seed)
        seed_dropout(seed * accelerator.num_processes + accelerator.process_index, accelerator.device)
        whole = number * accelerator.num_processes
        mine = slice(number * accelerator.process_index, number * (accelerator.process_index + 1))
        draw: dict[str, Any] = {"generator": self.generator, "device": accelerator.device}
        noise = torch.randn((whole, *self.drift.event_shape), **draw)[mine]
        timesteps = self._draw_times(whole)[mine]
        sample, condition, observed = self._examples(batch, lambda: torch.rand(whole, **draw)[mine])
        sample = sample if self.normalizer is None else self.normalizer.normalize(sample)
        return Draw(sample, noise, timesteps, condition, observed)

    def _draw_times(self, number: int) -> Tensor:
        if self.config.time_sampling == "uniform":
            return torch.randint(
                len(self.scheduler), (number,), generator=self.generator, device=self.accelerator.device
            )
        version = self.drift.version()
        if self._times is None or self._times[0] != version:
            weights = time_probabilities(self.scheduler, self.config.time_sampling)
            self._times = version, weights.float().to(self.accelerator.device)
        return torch.multinomial(self._times[1], number, replacement=True, generator=self.generator)

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Numbered batches, of samples or of samples and classes, from where the run stands."""
        done = self.step * self.config.gradient_accumulation_steps
        self.sampler.epoch, skip = divmod(done, len(self.loader))
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        while True:
            for batch in loader:
                yield done, batch
                done += 1
            self.sampler.epoch += 1
            loader = self.loader

    def _summed(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU, summed over the processes."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return tensor  # a device without float64 has no place for it
        return accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu()

    def _stage(self, approximation: StochasticApproximation) -> StageOutput:
        """Stochastic approximation: simulate with the network as it is, step lambda."""
        started = time.perf_counter()
        accelerator = self.accelerator
        with self._averaged_network() as network:

            def score(x: Tensor, k: int, condition: Tensor | None = None) -> Tensor:
                told = self._stage_condition(network, x, condition)
                return self.scheduler.get_score(self._predict(network, x, k, told), k, x)

            output = approximation.update(
                score,
                device=accelerator.device,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                reduce_sum=self._summed,
                data=self.samples,
                condition=self._stage_examples(network, approximation.num_stages),
            )
        self.sa_seconds += time.perf_counter() - started
        self.lambdas.append(output.lam)
        moments = {f"moment/{i}": value for i, value in enumerate(output.score_x.flatten()[:8].tolist())}
        accelerator.log(moments, step=self.step)
        return output

    def _averaged_network(self) -> contextlib.AbstractContextManager[torch.nn.Module]:
        """The network in evaluation, with its averaged weights and without a distributed wrapper."""
        self.last_loss = None
        return averaged(self.network, self.ema)

    def _check_sampling(self) -> None:
        """Take the first step of sampling; what is wrong with it would be found out after hours."""
        scheduler, generator = VSDMScheduler.from_config(self.scheduler.config), torch.Generator()
        scheduler.set_timesteps(self.config.ddpm_num_inference_steps or default_num_steps(scheduler))
        x = scheduler.sample_prior((1, *self.dataset.event_shape), generator)
        scheduler.step(x, scheduler.timesteps[0], x, generator=generator)

    def _new_approximation(self) -> StochasticApproximation:
        config = self.config
        return StochasticApproximation(
            self.drift,
            self.scheduler.integrated_beta,
            zeta=config.zeta,
            zeta_placement=config.zeta_placement,
            update=config.sa_update,
            prior=config.sa_prior,
            prior_variance=1.0 if config.prior_type == "standard" else None,
            variance_exploding=self.scheduler.is_variance_exploding,
            num_trajectories=config.sa_trajectories,
            num_steps=config.sa_steps or None,
            batch_size=config.sa_batch_size or None,
            step_scale=config.sa_step_scale,
            step_offset=config.sa_step_offset,
            step_power=config.sa_step_power,
            step_count=config.sa_step_count,
            seed=config.seed,
        )

    def _new_ema(self, decay: float) -> EMAModel | None:
        if not self.config.use_ema:
            return None
        return EMAModel(self.network.parameters(), decay=decay, foreach=not is_sharded(self.network))

    def _log(self, bar: tqdm) -> None:
        loss = self.losses.mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {self.step}: lower `learning_rate`, or choose another `weighting`."
            )
        lam = self.drift.lam.flatten()
        bar.set_postfix(loss=f"{loss:.4f}", **{"lambda": " ".join(f"{x:.3f}" for x in lam[:4].tolist())})
        scalars = {f"lambda/{i}": x for i, x in enumerate(lam[:8].tolist())}
        self.accelerator.log({"loss": loss, "lr": self.lr_scheduler.get_last_lr()[0], **scalars}, step=self.step)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `checkpoint-{step}` on the main process."""
        is_main = self.accelerator.is_main_process
        state = self._state() if is_main or is_sharded(self.network) else None
        if is_main and state is not None:
            save_checkpoint(self.folder, self.step, *state, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            ValueError: The checkpoint is damaged, or belongs to a run with other settings.
        """
        tensors, numbers = load_checkpoint(path)
        check_settings(path, numbers["config"], self._identity(), self.config.default_identity())
        # the sum does not turn with the axes
        if not torch.isclose(tensors["drift.data_variance"].sum(), self.drift.data_variance.sum(), rtol=1e-4):
            raise ValueError(
                f"The checkpoint {path} is of a run on other data, whose variance differs: give those, or start a new"
                " run in another `output_dir`."
            )
        self.drift.load_state_dict(inside(tensors, "drift"))
        load_learner(self.network, self.optimizer, self.ema, tensors, numbers)
        self.lr_scheduler.load_state_dict(self.lr_scheduler.state_dict() | numbers["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        self.lambdas = list(tensors["lambdas"])
        self.losses = tensors["losses"].to(self.accelerator.device)
        if self.approximation is not None:
            self.approximation.load_state_dict(inside(tensors, "stages"))
        self.step, self.seconds, self.sa_seconds = numbers["step"], numbers["seconds"], numbers["sa_seconds"]

    def _identity(self) -> dict[str, Any]:
        """What all parts of a run share."""
        return self.config.identity(
            num_examples=len(self.dataset),
            num_processes=self.accelerator.num_processes,
            network=json.loads(json.dumps({k: v for k, v in self.network.config.items() if not k.startswith("_")})),
        )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = learner_state(self.network, self.optimizer, self.ema)
        tensors |= {f"drift.{name}": tensor for name, tensor in self.drift.state_dict().items()}
        tensors |= {"lambdas": torch.stack(self.lambdas), "losses": self.losses}
        if self.approximation is not None:
            tensors |= {f"stages.{name}": tensor for name, tensor in self.approximation.state_dict().items()}
        schedule = self.lr_scheduler.state_dict()
        return tensors, numbers | {
            "config": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "sa_seconds": self.sa_seconds,
            "lr_scheduler": {key: value for key, value in schedule.items() if _is_plain(value)},
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }


def _is_plain(value: Any) -> bool:
    """Numbers and lists of numbers, as against the functions that a learning-rate schedule also lists."""
    return isinstance(value, (int, float, bool)) or (
        isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)
    )
