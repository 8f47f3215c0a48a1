"""Algorithm 1 over Accelerate: score matching, and every so often a stage of stochastic approximation."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import sample_toy
from ..drift import AdaptiveDiagonalDrift
from ..models import MLPModel
from ..normalizer import DataNormalizer
from ..objectives import denoising_score_matching
from ..pipelines import VSDMPipeline
from ..schedulers import VSDMScheduler
from ..stochastic_approximation import StageOutput, StochasticApproximation
from .config import POWER_LAW, TrainingConfig


@dataclass
class TrainingResult:
    r"""What a run leaves behind.

    Attributes:
        pipeline: The trained pipeline, with the averaged weights if there are any.
        lambdas: $\lambda$ at the start and after each stage, shape `(stages + 1, *lambda_shape)`, float64.
        final_loss: Mean loss of the last hundred steps.
        seconds: Wall time of the training loop.
        sa_seconds: Share of it spent in stochastic approximation: simulation and update.
        sa_skipped: Stages skipped because their moments were not finite.
    """

    pipeline: VSDMPipeline
    lambdas: Tensor
    final_loss: float
    seconds: float
    sa_seconds: float
    sa_skipped: int


class _Samples(Dataset):
    """A tensor that is read a batch at a time."""

    def __init__(self, data: Tensor):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.data[indices]


def build_scheduler(config: TrainingConfig, data: Tensor) -> tuple[VSDMScheduler, AdaptiveDiagonalDrift]:
    """The process of a run, and its neutral drift that knows the moments of `data` (model units)."""
    settings = {
        "prediction_type": config.prediction_type,
        "prior_type": config.prior_type,
        "solver": config.solver,
        "clip_sample": False,
    }
    if config.beta_schedule == POWER_LAW:
        scheduler = VSDMScheduler.from_power_law(
            config.beta_min, config.beta_max, config.beta_power, config.ddpm_num_steps, **settings
        )
    else:
        scheduler = VSDMScheduler(
            num_train_timesteps=config.ddpm_num_steps, beta_schedule=config.beta_schedule, **settings
        )
    drift = AdaptiveDiagonalDrift(tuple(data.shape[1:]))
    drift.fit_moments(data)
    scheduler.set_drift(drift)
    return scheduler, drift


def train(config: TrainingConfig) -> TrainingResult:
    """Train a model as `config` says; nothing is written but logs.

    Raises:
        FloatingPointError: The loss is no longer finite.
        ValueError: The data holds NaN or infinite values.
    """
    set_seed(config.seed)
    folder = Path(config.output_dir)
    trackers = None if config.logger == "none" else config.logger
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=trackers,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / config.logging_dir)),
    )
    if trackers:
        accelerator.init_trackers("vsdm", config=asdict(config))

    data = sample_toy(config.dataset_name, config.num_train_samples, torch.Generator().manual_seed(config.seed))
    if not torch.isfinite(data).all():
        raise ValueError(f"The data set {config.dataset_name!r} holds NaN or infinite values: remove them.")
    normalizer = DataNormalizer.from_data(data) if config.standardize else None
    data = data if normalizer is None else normalizer.normalize(data)

    scheduler, drift = build_scheduler(config, data)
    network = MLPModel(
        in_channels=data.shape[1],
        num_train_timesteps=config.ddpm_num_steps,
        width=config.model_width,
        num_blocks=config.model_num_blocks,
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay, betas=(0.9, 0.999)
    )
    # Accelerate steps a prepared schedule once for each process
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
    )
    loader = DataLoader(
        _Samples(data),
        batch_size=config.train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda batch: batch,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(network, optimizer, loader, lr_scheduler)
    approximation = StochasticApproximation(
        drift,
        scheduler.integrated_beta,
        zeta=config.zeta,
        zeta_placement=config.zeta_placement,
        prior=config.sa_prior,
        num_trajectories=config.sa_trajectories,
        step_scale=config.sa_step_scale,
        step_offset=config.sa_step_offset,
        step_power=config.sa_step_power,
        seed=config.seed,
    )

    def new_ema() -> EMAModel | None:
        return EMAModel(network.parameters(), decay=config.ema_max_decay) if config.use_ema else None

    def run_stage() -> StageOutput:
        # the same network without the gradient machinery of a distributed wrapper
        network.eval()
        output = approximation.update(
            lambda x, k: scheduler.get_score(network(x, k).sample, k, x),
            device=accelerator.device,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            reduce_sum=lambda tensor: accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu(),
        )
        network.train()
        return output

    ema = new_ema()
    lambdas: list[Tensor] = [drift.lam.clone()]
    losses: list[Tensor] = []
    sa_seconds = 0.0
    generator = torch.Generator(accelerator.device)
    batches = _endless(loader)
    started = time.perf_counter()
    bar = tqdm(
        range(1, config.max_train_steps + 1),
        desc="Training",
        disable=not accelerator.is_local_main_process,
        leave=False,
    )
    for step in bar:
        sample = next(batches)
        # keyed by step and process: no state to save, no two alike
        generator.manual_seed(
            (config.seed * config.max_train_steps + step) * accelerator.num_processes + accelerator.process_index
        )
        draw = {"generator": generator, "device": accelerator.device}
        noise = torch.randn(sample.shape, **draw)
        timesteps = torch.randint(config.ddpm_num_steps, (len(sample),), **draw)
        with accelerator.autocast():
            prediction = model(scheduler.add_noise(sample, noise, timesteps), timesteps).sample
        loss = denoising_score_matching(scheduler, prediction, sample, noise, timesteps, config.weighting)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(network.parameters())
        losses = [*losses[-99:], loss.detach()]

        if step in config.stage_steps:
            stage_started = time.perf_counter()
            stage = run_stage()
            sa_seconds += time.perf_counter() - stage_started
            lambdas.append(stage.lam)
            accelerator.log(
                {f"moment/{i}": value for i, value in enumerate(stage.score_x.flatten()[:8].tolist())}, step=step
            )
        if step == config.adaptive_steps and config.stage_steps:
            # from here to the end the network meets only the lambda that is saved with it
            drift.set_lambda(drift.average(config.sa_average))
            ema = new_ema()

        if step % config.logging_steps == 0 or step == config.max_train_steps:
            value = torch.stack(losses).mean().item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss is {value} at step {step}: lower `learning_rate`, or choose another `weighting`."
                )
            lam = drift.lam.flatten()
            bar.set_postfix(loss=f"{value:.4f}", **{"lambda": " ".join(f"{x:.3f}" for x in lam[:4].tolist())})
            scalars = {f"lambda/{i}": x for i, x in enumerate(lam[:8].tolist())}
            accelerator.log({"loss": value, "lr": lr_scheduler.get_last_lr()[0], **scalars}, step=step)
    seconds = time.perf_counter() - started
    accelerator.end_training()

    if ema is not None:
        ema.copy_to(network.parameters())
    pipeline = VSDMPipeline(
        network.eval(), scheduler, None if normalizer is None else normalizer.to(accelerator.device)
    )
    return TrainingResult(
        pipeline=pipeline,
        lambdas=torch.stack(lambdas),
        final_loss=torch.stack(losses).mean().item(),
        seconds=seconds,
        sa_seconds=sa_seconds,
        sa_skipped=approximation.num_skipped,
    )


def _endless(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        yield from loader
