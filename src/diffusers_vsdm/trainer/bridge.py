r"""Training networks on both sides (SB-FBSDE), from a trained VSDM or score-based model on.

The model of [`Trainer`], whose forward process is linear, is the start: its score is the first backward half bridge of
iterative proportional fitting. Then half bridges take turns: the forward network is trained on paths of the backward
process and the backward network on those of the forward one. `alternating` minimises 8a and 8b of Chen et al.,

$$ E \left[ \tfrac12 |z_f + z_b|^2 + \nabla \cdot z \right] , $$

with the divergence of the one that is trained; each is the implicit score matching of Eq. 24 of Kaba et al. `matching`
finds the same half bridges by regression (Shi et al.): between their ends the paths are bridges of the reference, so
that only ends need be simulated and no network is differentiated in x. `joint` minimises Eq. 24 in both networks at
once, through simulated paths, as the bound of the steps that are taken (a variational autoencoder's): its integral,
over paths of steps, is none, and drifts that are long beside a step take it below the entropy of the data. It has many
minimisers, of which the bridge is the one of least control energy $\frac12 \int E |z_f|^2 dg$: `control_energy` weighs
that, less and less, as a weight that stays would not arrive at the prior.

References:
    Chen, Liu, Theodorou (2022), "Likelihood Training of Schrödinger Bridge using Forward-Backward SDEs Theory".
    De Bortoli, Thornton, Heng, Doucet (2021), "Diffusion Schrödinger Bridge with Applications to Score-Based
        Generative Modeling": iterative proportional fitting, cached paths.
    Kaba, Shimizu, Ohzeki, Sughiyama (2024), "Schrödinger Bridge Type Diffusion Models as an Extension of Variational
        Autoencoders".
    Shi, De Bortoli, Campbell, Doucet (2023), "Diffusion Schrödinger Bridge Matching": DSBM-IPF.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..bridges.two_sided import Policy, TwoSidedProcess
from ..data import TOYS, sample_toy
from ..files import write_atomically
from ..objectives import implicit_matching
from ..objectives.divergence import divergence, draw_probe
from ..pipelines import BridgePipeline, VSDMPipeline
from ..schedulers.scheduling_vsdm import PRIORS
from .algorithm import LOSS_WINDOW
from .averaging import averaged
from .checkpoint import (
    check_settings,
    find_checkpoint,
    inside,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from .config import TrainingConfig, setting
from .learner import learner_state, load_learner
from .loop import train
from .processes import process_state
from .setup import build_accelerator, build_data, build_network, build_optimizer, mirrored, on_device, seed_dropout


OBJECTIVES = ("matching", "alternating", "joint")
FORWARD, BACKWARD = 1, -1
MOST_EXACT = 4  # dimensions: an exact divergence takes a backward pass for each
# a divergence can be made as low as one likes at points that do not change, and nowhere else
REFRESH = {"matching": 100, "alternating": 25}
MOST_AWAY = 100  # times as far as either end: paths that go there have blown up
ENERGY_FALL = 0.01  # of the weight of the control energy, over the run
BRIDGE_FOLDER, START_RECORD = "bridge", "start.json"
Pair = tuple[Tensor, Tensor]
T = TypeVar("T")


@dataclass
class BridgeConfig(TrainingConfig):
    """Settings of a run: those of the model to start from, and those of the bridge."""

    script: ClassVar[str] = "training/train_sb_fbsde.py"

    baseline: str = setting(
        "sgm", "Start from `sgm`, lambda frozen at 1, or from a learned one, `none`.", ("none", "sgm")
    )
    prior_type: str = setting("conditional", "Law at the other end: N(0, s_T^2), the marginal, or N(0, I).", PRIORS)
    prior_dataset_name: str = setting("", f"A toy at the other end, instead of the Gaussian prior: {', '.join(TOYS)}.")
    objective: str = setting(
        "matching",
        "Half bridges in turn, by bridges between ends or along paths, or both networks at once.",
        OBJECTIVES,
    )
    bridge_stages: int = setting(5, "Pairs of half bridges.")
    bridge_steps: int = setting(1000, "Gradient steps of each half bridge.")
    bridge_paths: int = setting(1024, "Simulated paths that are kept and drawn from, per process.")
    bridge_refresh: int = setting(0, "Gradient steps between new ones; 0 for 25 of `alternating`, 100 of `matching`.")
    bridge_num_steps: int = setting(0, "Steps of a path; 0 for all training times.")
    bridge_corrector_steps: int = setting(0, "Langevin steps after each of them, of `alternating`.")
    bridge_learning_rate: float = setting(5e-4, "Learning rate of both networks, falling to 0 over the run.")
    bridge_ema_decay: float = setting(0.995, "Decay of the averages of their weights, which simulate.")
    control_energy: float = setting(0.0, "Weight of the control energy in the joint objective, at first; it falls.")

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            ValueError: A setting is out of its range.
        """
        super().__post_init__()
        for name in ("bridge_stages", "bridge_steps", "bridge_paths", "bridge_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("control_energy", "bridge_refresh", "bridge_corrector_steps", "bridge_num_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.bridge_ema_decay < 1:
            raise ValueError(f"`bridge_ema_decay` must lie in [0, 1), got {self.bridge_ema_decay}.")
        if self.bridge_num_steps > self.ddpm_num_steps and not self.pretrained_model_name_or_path:
            raise ValueError(
                f"`bridge_num_steps` must not be above the {self.ddpm_num_steps} training times, got"
                f" {self.bridge_num_steps}."
            )
        if self.control_energy and self.objective != "joint":
            raise ValueError(f"`control_energy` is for `objective` 'joint', not {self.objective!r}: leave it out.")
        if self.lambda_varies:
            raise ValueError("`lambda_varies` gives no reference for a bridge: leave it out.")
        if self.prior_dataset_name and (self.prior_dataset_name not in TOYS or not self.is_toy):
            raise ValueError(f"`prior_dataset_name` must be one of {tuple(TOYS)}, and the data a toy too.")
        if self.class_conditional:
            raise ValueError("`class_conditional` is not for bridges: leave it out.")
        if self.prior_dataset_name and self.objective == "joint":
            raise ValueError("`objective` 'joint' needs the density of the prior, which `prior_dataset_name` has not.")
        if self.bridge_corrector_steps and self.objective != "alternating":
            raise ValueError(
                f"`bridge_corrector_steps` keep the law at each time, but not the paths, on which `objective`"
                f" {self.objective!r} trains: use 'alternating'."
            )
        if self.prior_dataset_name and self.standardize:
            raise ValueError("`standardize` is of one data set: leave it out between two.")


@dataclass
class BridgeResult:
    """What a run leaves behind.

    Attributes:
        config: The settings, with the precision that Accelerate chose.
        start: The model that it started from.
        pipeline: The trained pipeline, with averaged weights.
        losses: Mean loss of the last hundred steps of each half bridge, in the order of training.
        start_seconds, seconds: Wall time of the training of either.
    """

    config: BridgeConfig
    start: VSDMPipeline
    pipeline: BridgePipeline
    losses: list[float]
    start_seconds: float
    seconds: float


@dataclass
class _Side:
    """One of the two networks, with what trains it."""

    network: ModelMixin
    optimizer: torch.optim.Optimizer
    ema: EMAModel


class BridgeTrainer:
    """One run, from a trained model on.

    Each process simulates paths and draws batches of its own, and all descend along the mean of their gradients.

    Args:
        config ([`BridgeConfig`]): The settings.
        start ([`VSDMPipeline`]): The model to start from; its network goes on as the backward one.
    """

    def __init__(self, config: BridgeConfig, start: VSDMPipeline):
        self.accelerator = _accelerator(config)
        self.config = config = replace(config, mixed_precision=self.accelerator.mixed_precision)
        self.folder = Path(config.output_dir) / BRIDGE_FOLDER
        set_seed(config.seed)
        self.data = on_device(build_data(config), self.accelerator.device)
        forward_network = build_network(config, self.data.event_shape, len(start.scheduler))
        if config.channels_last:  # which a saved start does not remember
            start.unet.to(memory_format=torch.channels_last)
        self._start_at_zero(forward_network)
        prior = "data" if config.prior_dataset_name else "gaussian"
        self.pipeline = BridgePipeline(start.unet, start.scheduler, start.normalizer, forward_network, prior)
        self.pipeline.to(self.accelerator.device)
        networks = {FORWARD: forward_network, BACKWARD: start.unet}
        self.sides = {direction: self._side(network) for direction, network in networks.items()}
        pipeline = self.pipeline
        policies = (self._in_precision(pipeline._forward_policy), self._in_precision(pipeline._backward_policy))
        self.process = TwoSidedProcess(
            start.scheduler, *policies, config.bridge_num_steps or None, config.bridge_corrector_steps
        )
        self.generator = torch.Generator(self.accelerator.device)
        self.half, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.recent: list[Tensor] = []
        name = config.resume_from_checkpoint if list_checkpoints(self.folder) else ""  # the start was interrupted
        if name and (checkpoint := find_checkpoint(self.folder, name)) is not None:
            self.load(checkpoint)

    @property
    def num_halves(self) -> int:
        """Half bridges of the whole run."""
        return 2 * self.config.bridge_stages

    def train(self) -> BridgePipeline:
        """Run to the end, with a checkpoint after every half bridge.

        Raises:
            FloatingPointError: Paths, a loss or a gradient are not finite; the message names the stage. The last
                checkpoint is the last that was whole.
        """
        config, started = self.config, time.perf_counter() - self.seconds
        if config.logger != "none":
            self.accelerator.init_trackers("sb-fbsde", config=asdict(config))
        while self.half < self.num_halves:
            stage, direction = self.half // 2 + 1, FORWARD if self.half % 2 == 0 else BACKWARD
            try:
                loss = self._joint() if config.objective == "joint" else self._half_bridge(direction)
            except FloatingPointError as error:
                name = (
                    "joint" if config.objective == "joint" else {FORWARD: "forward", BACKWARD: "backward"}[direction]
                )
                kept = list_checkpoints(self.folder)
                raise FloatingPointError(
                    f"Stage {stage}, {name} networks: {error} Lower `bridge_learning_rate`, which a resumed run may"
                    f" have; the last whole checkpoint is {kept[-1] if kept else 'none: see `checkpointing_steps`'}."
                ) from error
            self.losses.append(loss)
            self.half += 1
            self.seconds = time.perf_counter() - started
            if config.checkpointing_steps:
                if self.accelerator.is_main_process:
                    self.save()
                self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        for side in self.sides.values():
            side.ema.copy_to(side.network.parameters())
            side.network.eval()
        return self.pipeline

    # The algorithm --------------------------------------------------------------------------------------------------

    def _half_bridge(self, direction: int) -> float:
        """Train one network on the other's process."""
        config = self.config
        loss_of = {"matching": self._between_ends, "alternating": self._along_paths}[config.objective]
        refresh = config.bridge_refresh or REFRESH[config.objective]
        for step, generator in self._steps():
            if step % refresh == 0:
                self.process = self.process.moved(generator)
                simulated = self._simulate(-direction)
            draw: dict[str, Any] = {"size": (config.train_batch_size,), "generator": generator}
            draw["device"] = self.accelerator.device
            which, step_of = torch.randint(config.bridge_paths, **draw), torch.randint(len(self.process), **draw)
            loss = loss_of(simulated, which, step_of, direction, generator)
            self._descend(loss, direction)
        return self._mean_loss()

    def _between_ends(
        self, ends: Pair, which: Tensor, step_of: Tensor, direction: int, generator: torch.Generator
    ) -> Tensor:
        """Of the reference's bridges between these ends, at the times where the network's steps start."""
        process, at = self.process, step_of if direction == FORWARD else step_of + 1
        ends = ends[0][which], ends[1][which]
        x, target, scale = process.matching_target(ends, at, direction, generator)
        error = self._own(direction)(x, process.times.to(x.device)[at].clamp(min=0)) - target
        return (scale * process.scheduler.basis(x).to_basis(error)).square().flatten(1).sum(1).mean()

    def _along_paths(
        self, simulated: Pair, which: Tensor, at: Tensor, direction: int, generator: torch.Generator
    ) -> Tensor:
        """Of 8a or 8b, on the paths' own points."""
        paths, controls = simulated
        x, k = paths[at + 1, which], self.process.times.to(paths.device)[at + 1]
        probe = draw_probe(x, self._divergence(x), generator)
        mine, trace = divergence(partial(_at, self._own(direction), k), x, probe, create_graph=True)
        return (self._weight(x, k) * implicit_matching(controls[at, which], -mine, -trace)).mean()

    def _own(self, direction: int) -> Policy:
        return self.process.forward if direction == FORWARD else self.process.backward

    def _joint(self) -> float:
        """Train both networks through simulated forward paths: the bound of Eq. 24, and the control energy."""
        config = self.config
        log_prior = self.pipeline.scheduler.prior(self.accelerator.device, torch.float32).log_prob
        for step, generator in self._steps():
            weight = config.control_energy * ENERGY_FALL ** self._progress(step)
            process = self.process.moved(generator)
            widths = torch.diff(process.g).to(self.accelerator.device, torch.float32)
            start = self._ends(FORWARD, config.train_batch_size)
            path, controls = self._in_all(process.run, start, FORWARD, generator)
            energy = 0.5 * widths @ controls.square().flatten(2).sum(2)
            bound = -process.entropy(start) - process.log_density(path, BACKWARD).sum(0) - log_prior(path[-1])
            loss = (bound + weight * energy).mean()
            self._descend(loss, FORWARD, BACKWARD)
        return self._mean_loss()

    def _steps(self) -> Iterator[tuple[int, torch.Generator]]:
        """Numbered gradient steps of this half bridge, each with its own randomness."""
        config, name = self.config, f"Half bridge {self.half + 1}/{self.num_halves}"
        self.recent = []
        done = self.half * config.bridge_steps
        hidden, process_index = not self.accelerator.is_local_main_process, self.accelerator.process_index
        for step in tqdm(range(config.bridge_steps), name, leave=False, disable=hidden):
            seed = (config.seed + 1) * 1_000_000_007 + (done + step) * 104_729 + process_index * 15_485_863
            self.generator.manual_seed(seed)
            seed_dropout(seed, self.accelerator.device)
            falling = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
            for side in self.sides.values():
                side.optimizer.param_groups[0]["lr"] = config.bridge_learning_rate * falling
            yield step, self.generator
            if (done + step + 1) % config.logging_steps == 0:
                self.accelerator.log({"loss": self._mean_loss()}, step=done + step + 1)

    def _progress(self, step: int) -> float:
        """Share of the run before this step of the half bridge."""
        return (self.half + step / self.config.bridge_steps) / self.num_halves

    def _mean_loss(self) -> float:
        """Of the last steps of this half bridge."""
        return float(torch.stack(self.recent).mean())

    @torch.no_grad()
    def _simulate(self, direction: int) -> Pair:
        """Paths with the averaged weights, and the controls along them; to match their ends, x_0 and x_T alone."""
        side, start = self.sides[direction], self._ends(direction, self.config.bridge_paths)
        with averaged(side.network, side.ema):
            if self.config.objective != "matching":
                return self._in_all(self._paths, start, direction)
            end = self._in_all(self._arrive, start, direction)
        return (start, end) if direction == FORWARD else (end, start)

    def _paths(self, start: Tensor, direction: int) -> Pair:
        path, controls = self.process.run(start, direction, self.generator)
        self._check_size(path, start)
        return path, controls

    def _arrive(self, start: Tensor, direction: int) -> Tensor:
        end = self.process.arrive(start, direction, self.generator)
        self._check_size(end, start)
        return end

    def _check_size(self, path: Tensor, start: Tensor) -> None:
        """Refuse paths that are finite and blown up all the same."""
        ends = [start, *(self._ends(direction, 64) for direction in self.sides)]  # few tell the scale
        most, largest = MOST_AWAY * max(float(end.abs().max()) for end in ends), float(path.abs().max())
        if largest > most:
            raise FloatingPointError(f"The paths go as far as {largest:.3g}, and the ends to {most / MOST_AWAY:.3g}.")

    def _in_all(self, simulate: Callable[..., T], *arguments: Any) -> T:
        """What is simulated; paths that blow up in one process end all, that none should wait for it."""
        error, found = None, None
        try:
            found = simulate(*arguments)
        except FloatingPointError as blown:
            error = blown
        failed = torch.tensor(float(error is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed):
            raise error or FloatingPointError("Paths of another process are not finite.")
        return cast(T, found)

    def _ends(self, direction: int, number: int) -> Tensor:
        """Samples of the data (forward) or of the prior (backward), in model units."""
        generator = self.generator
        device = self.accelerator.device
        if direction == BACKWARD and not self.config.prior_dataset_name:
            return self.pipeline.scheduler.sample_prior((number, *self.data.event_shape), generator, device)
        if direction == BACKWARD:
            seed = int(torch.randint(1 << 31, (1,), generator=generator, device=device))
            return sample_toy(self.config.prior_dataset_name, number, torch.Generator().manual_seed(seed)).to(device)
        chosen = torch.randint(len(self.data), (number,), generator=generator, device=device).tolist()
        samples = self.data.__getitems__(chosen).to(device)
        if self.config.random_flip:
            samples = mirrored(samples, torch.rand(number, generator=generator, device=device))
        normalizer = self.pipeline.normalizer
        return samples if normalizer is None else normalizer.normalize(samples)

    def _weight(self, x: Tensor, k: Tensor) -> Tensor:
        """The variance of the noise: $z_b$ is as large as its inverse root, and with it the noise of both losses."""
        _, s = self.pipeline.scheduler.marginal_scales(x, k)
        return s.square().flatten(1).mean(1)

    @staticmethod
    def _divergence(x: Tensor) -> str:
        return "exact" if x[0].numel() <= MOST_EXACT else "rademacher"

    def _descend(self, loss: Tensor, *directions: int) -> None:
        """A step of the optimizers of these networks."""
        mean = self.accelerator.reduce(loss.detach(), "mean")
        if not torch.isfinite(mean):
            raise FloatingPointError(f"The loss is {float(mean)}.")
        sides = [self.sides[direction] for direction in directions]
        for side in sides:
            side.optimizer.zero_grad()
        loss.backward()
        self._share_gradients(sides)
        for side in sides:
            norm = torch.nn.utils.clip_grad_norm_(side.network.parameters(), self.config.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"The gradient's norm is {float(norm)}.")
            side.optimizer.step()
            side.ema.step(side.network.parameters())
        self.recent = [*self.recent[1 - LOSS_WINDOW :], mean]

    def _share_gradients(self, sides: list[_Side]) -> None:
        """The mean over the processes. (DDP takes one call of a network in a step, joint training makes many.)"""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for side in sides for p in side.network.parameters() if p.grad is not None]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _side(self, network: ModelMixin) -> _Side:
        config = self.config
        network.train()
        optimizer = build_optimizer(config, network, config.bridge_learning_rate, self.accelerator.device)
        return _Side(network, optimizer, EMAModel(network.parameters(), config.bridge_ema_decay, foreach=True))

    def _in_precision(self, policy: Policy) -> Policy:
        def wrapped(x: Tensor, k: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return policy(x, k).float()

        return wrapped

    @staticmethod
    def _start_at_zero(network: ModelMixin) -> None:
        """A forward network that does nothing yet: the bridge's reference."""
        *_, last = (m for m in network.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.zero_()

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `bridge/checkpoint-{half bridge}`."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {"config": self._identity(), "half": self.half}
        numbers |= {"losses": self.losses, "seconds": self.seconds}
        for name, side in self._named().items():
            own, numbers[name] = learner_state(side.network, side.optimizer, side.ema)
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        save_checkpoint(self.folder, self.half, tensors, numbers, self.config.checkpoints_total_limit)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            ValueError: The checkpoint is damaged, or belongs to a run with other settings.
        """
        tensors, numbers = load_checkpoint(path)
        check_settings(path, numbers["config"], self._identity(), self.config.default_identity())
        for name, side in self._named().items():
            load_learner(side.network, side.optimizer, side.ema, inside(tensors, name), numbers[name])
        self.half, self.losses, self.seconds = numbers["half"], numbers["losses"], numbers["seconds"]

    def _identity(self) -> dict[str, Any]:
        return self.config.identity(num_examples=len(self.data), num_processes=self.accelerator.num_processes)

    def _named(self) -> dict[str, _Side]:
        return {"forward": self.sides[FORWARD], "backward": self.sides[BACKWARD]}


def _at(policy: Policy, k: Tensor, x: Tensor) -> Tensor:
    return policy(x, k)


def _accelerator(config: BridgeConfig) -> Accelerator:
    accelerator = build_accelerator(config)
    if accelerator.scaler is not None:
        raise ValueError("`mixed_precision` 'fp16' is not for bridges, whose losses are not scaled: use 'bf16'.")
    return accelerator


def _trained_start(config: BridgeConfig, folder: Path | None) -> tuple[VSDMPipeline, float]:
    """The model to start from and the seconds of its training; kept in `folder`, from where a resumed run takes it."""
    unmeasured = replace(config, num_likelihood_samples=0)
    if folder is None:
        result = train(unmeasured)
        return result.pipeline, result.seconds
    own = {setting.name for setting in fields(TrainingConfig)}
    settings, default = (
        {name: value for name, value in identity.items() if name in own}
        for identity in (config.identity(), config.default_identity())
    )
    is_main, record = process_state().is_main_process, folder / START_RECORD
    if config.resume_from_checkpoint and record.exists():
        known = json.loads(record.read_text())
        check_settings(folder, known["config"], settings, default)
        return VSDMPipeline.from_pretrained(folder), known["seconds"]
    result = train(unmeasured)
    if is_main and not config.resume_from_checkpoint:  # those of a run that this one replaces
        for old in (folder, folder.with_name(BRIDGE_FOLDER)):
            shutil.rmtree(old, ignore_errors=True)
    if is_main:
        result.pipeline.save_pretrained(folder)
        write_atomically(record, json.dumps({"config": settings, "seconds": result.seconds}).encode())
    return result.pipeline, result.seconds


def train_bridge(
    config: BridgeConfig, start: VSDMPipeline | None = None, start_folder: Path | None = None
) -> BridgeResult:
    """Train a bridge, from `start` if given, else from a model that is trained first and kept in `start_folder`.

    Raises:
        ValueError: The settings do not fit each other, the data or the start that is resumed.
        FloatingPointError: Paths, a loss or a gradient are not finite.
    """
    config = replace(config, mixed_precision=_accelerator(config).mixed_precision)
    start_seconds = 0.0
    if start is None:
        start, start_seconds = _trained_start(config, start_folder)
    network = copy.deepcopy(start.unet)  # goes on, and the start stays what it was
    trainer = BridgeTrainer(config, VSDMPipeline(network, start.scheduler, start.normalizer))
    pipeline = trainer.train()
    return BridgeResult(trainer.config, start, pipeline, trainer.losses, start_seconds, trainer.seconds)
