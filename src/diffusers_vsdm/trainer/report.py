"""The output of a run: pipeline, metrics.json, samples.png, drift.png and the model card."""

import json
import math
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..data import sample_toy
from ..files import write_atomically
from ..hub.cards import render_card
from ..hub.remote_code import write_remote_code
from ..metrics.transport import straightness, wasserstein2
from ..pipelines import VSDMPipeline
from ..schedulers import VSDMScheduler
from .algorithm import TrainingResult
from .config import BROWNIAN, EXPLODING, POWER_LAW, RunConfig, TrainingConfig
from .pictures import EVALUATION_SEED, picture_drift, picture_paths, picture_samples, summary


def flow_paths(
    pipeline: VSDMPipeline, num_samples: int, num_steps: int, seed: int = EVALUATION_SEED
) -> tuple[Tensor, list[int]]:
    """Euler paths of the probability flow, from the prior to the first training time, in data units.

    The clock is g, or sigma with a table of sigmas (Karras et al. 2022, Algorithm 1), where steps in g are poor.

    Args:
        pipeline: A pipeline for vectors; it is left as it is.
        num_samples: Number of paths.
        num_steps: Steps at most. The grid is uniform, but for a last step that may be shorter.
        seed: Of the prior's draw.

    Returns:
        The paths `(num_times, num_samples, d)`, and their training times, falling to 0.
    """
    num_train = pipeline.scheduler.config["num_train_timesteps"]
    timesteps = list(range(num_train - 1, 0, -math.ceil((num_train - 1) / num_steps)))
    solver = "ddim" if pipeline.scheduler.is_variance_exploding else "euler"
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver=solver, final_sigmas_type="sigma_min")
    sampler = VSDMPipeline(pipeline.unet, scheduler, pipeline.normalizer)
    sampler.set_progress_bar_config(disable=True)
    generator = torch.Generator(pipeline.unet.device).manual_seed(seed)
    _, paths = sampler(num_samples, generator, timesteps=timesteps, return_trajectory=True, return_dict=False)
    return paths.cpu(), [*timesteps, 0]


def evaluate(
    pipeline: VSDMPipeline, dataset_name: str, num_samples: int, num_steps: int
) -> tuple[dict[str, Any], Tensor]:
    """Straightness in data units and the 2-Wasserstein distance on standardised axes, with its floor.

    Returns:
        The metrics and the paths they were measured on, `(num_times, num_samples, d)`.
    """
    paths, times = flow_paths(pipeline, num_samples, num_steps)
    stride = times[0] - times[1]
    uniform = len(times) if times[-2] - times[-1] == stride else len(times) - 1
    reference, other = (
        sample_toy(dataset_name, num_samples, torch.Generator().manual_seed(EVALUATION_SEED + i)) for i in (1, 2)
    )
    num_train = pipeline.scheduler.config["num_train_timesteps"]
    return {
        "straightness": straightness(paths[:uniform], stride / num_train).tolist(),
        "w2_standardized": wasserstein2(paths[-1], reference, standardize=True),
        "w2_floor": wasserstein2(other, reference, standardize=True),
        "num_samples": num_samples,
        "num_function_evaluations": len(times) - 1,
    }, paths


def write_report(config: TrainingConfig, result: TrainingResult) -> dict[str, Any]:
    """Write everything into `config.output_dir`; returns what `metrics.json` holds."""
    folder = Path(config.output_dir)
    pipeline = result.pipeline
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    metrics = training_metrics(result, pipeline.unet)
    if result.likelihood is not None:
        metrics["likelihood"] = result.likelihood
    pictures = {"drift.png": drift_picture(config, result)}
    if not config.is_toy:
        pictures["samples.png"] = picture_samples(
            pipeline, config.eval_batch_size, config.ddpm_num_inference_steps or None
        )
    elif config.num_eval_samples:
        evaluation, paths = evaluate(pipeline, config.dataset_name, config.num_eval_samples, config.num_eval_steps)
        metrics |= evaluation
        generator = torch.Generator().manual_seed(EVALUATION_SEED + 3)
        pictures["samples.png"] = picture_paths(
            sample_toy(config.dataset_name, config.num_eval_samples, generator), paths
        )
    record = write_record(config, metrics)
    for name, picture in pictures.items():
        picture.save(folder / name)
    render_card(folder, record)
    write_remote_code(folder)
    return record


def training_metrics(result: TrainingResult, network: torch.nn.Module) -> dict[str, Any]:
    """What is known of a run without sampling."""
    return {
        "final_loss": result.final_loss,
        "lambda": summary(result.pipeline.scheduler.drift.lam),
        "lambda_per_stage": [summary(stage) for stage in result.lambdas],
        "sa_skipped": result.sa_skipped,
        "seconds": result.seconds,
        "sa_seconds": result.sa_seconds,
        "sa_share": result.sa_seconds / result.seconds,
        "num_parameters": sum(p.numel() for p in network.parameters()),
    }


def drift_picture(config: RunConfig, result: TrainingResult) -> Image.Image:
    """The stages of lambda, in the units of the process."""
    drift = result.pipeline.scheduler.drift
    scale, unit = {
        POWER_LAW: (config.beta_max, r"\beta_{\max}"),
        EXPLODING: (config.sigma_max**2, r"\sigma_{\max}^2"),
        BROWNIAN: (config.sigma_max**2, r"\sigma_{\max}^2"),
    }.get("" if getattr(config, "pretrained_model_name_or_path", "") else config.ddpm_beta_schedule, (1.0, ""))
    return picture_drift(result.lambdas * scale, drift.lam * scale, unit, drift.num_times is not None)


def write_record(config: RunConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write `metrics.json`; returns what it holds."""
    record = {"metrics": metrics, "config": config.public(), "command": config.command(), "versions": versions()}
    write_atomically(Path(config.output_dir) / "metrics.json", (json.dumps(record, indent=2) + "\n").encode())
    return record


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "diffusers_vsdm": __version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "torch": torch.__version__,
    }
