"""The output of a run: pipeline, metrics.json, samples.png, drift.png and the model card."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import matplotlib
import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data import sample_toy
from ..files import write_atomically
from ..hub.cards import render_card
from ..hub.remote_code import write_remote_code
from ..metrics.transport import straightness, wasserstein2
from ..pipelines import VSDMPipeline
from ..schedulers import VSDMScheduler
from .config import POWER_LAW, TrainingConfig
from .loop import TrainingResult


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


# far from the seeds that users give to training
EVALUATION_SEED = 1_000_003
FEW = 8  # so many lambdas are listed one by one


def flow_paths(
    pipeline: VSDMPipeline, num_samples: int, num_steps: int, seed: int = EVALUATION_SEED
) -> tuple[Tensor, list[int]]:
    """Euler paths of the probability flow, from the prior to the first training time, in data units.

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
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver="euler", final_sigmas_type="sigma_min")
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
    pipeline, lam = result.pipeline, result.pipeline.scheduler.drift.lam
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scale = config.beta_max if config.beta_schedule == POWER_LAW else 1.0
    metrics: dict[str, Any] = {
        "final_loss": result.final_loss,
        "lambda": _summary(lam),
        "lambda_per_stage": [_summary(stage) for stage in result.lambdas],
        "sa_skipped": result.sa_skipped,
        "seconds": result.seconds,
        "sa_seconds": result.sa_seconds,
        "sa_share": result.sa_seconds / result.seconds,
        "num_parameters": sum(p.numel() for p in pipeline.unet.parameters()),
    }
    pictures = {"drift.png": _plot_drift(result.lambdas * scale, lam * scale, scale)}
    if not config.is_toy:
        pictures["samples.png"] = _plot_images(pipeline)
    elif config.num_eval_samples:
        evaluation, paths = evaluate(pipeline, config.dataset_name, config.num_eval_samples, config.num_eval_steps)
        metrics |= evaluation
        generator = torch.Generator().manual_seed(EVALUATION_SEED + 3)
        pictures["samples.png"] = _plot_samples(
            sample_toy(config.dataset_name, config.num_eval_samples, generator), paths
        )
    record = {"metrics": metrics, "config": asdict(config), "versions": versions()}
    write_atomically(folder / "metrics.json", (json.dumps(record, indent=2) + "\n").encode())
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
        plt.close(figure)
    render_card(folder, record)
    write_remote_code(folder)
    return record


def _summary(lam: Tensor) -> list[float]:
    """Lambda itself where it is short, else its quantiles 0, 1/4, 1/2, 3/4 and 1."""
    flat = lam.flatten()
    return (flat if len(flat) <= FEW else flat.quantile(torch.linspace(0, 1, 5, dtype=flat.dtype))).tolist()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "diffusers_vsdm": __version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "torch": torch.__version__,
    }


def _plot_drift(lambdas: Tensor, final: Tensor, scale: float) -> plt.Figure:
    r"""$\lambda$ (times `scale`) over the stages as Figure 9 of the paper: each dimension, or quantiles of many."""
    short = final.numel() <= FEW
    names = [f"dimension {i}" for i in range(final.numel())] if short else ["least", "1/4", "median", "3/4", "largest"]
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    stages = torch.tensor([_summary(stage) for stage in lambdas])
    for name, values, end in zip(names, stages.T, _summary(final), strict=True):
        (line,) = axes.plot(values, label=name)
        axes.axhline(end, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xlabel("stage of stochastic approximation")
    axes.set_ylabel(r"$\lambda$" if scale == 1 else r"$\lambda \, \beta_{\max}$")
    axes.set_ylim(bottom=0)
    axes.legend(title="dotted: average, frozen", fontsize="small", title_fontsize="small")
    return figure


def _plot_images(pipeline: VSDMPipeline, side: int = 8) -> plt.Figure:
    """A grid of `side * side` samples."""
    generator = torch.Generator(pipeline.unet.device).manual_seed(EVALUATION_SEED)
    (images,) = pipeline(side * side, generator, output_type="np", return_dict=False)
    rows = images.reshape(side, side, *images.shape[1:])
    grid = np.concatenate(np.concatenate(rows, axis=1), axis=1)
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    axes.imshow(grid if grid.shape[-1] in (3, 4) else grid[..., 0], cmap="gray", interpolation="nearest")
    axes.axis("off")
    return figure


def _plot_samples(data: Tensor, paths: Tensor) -> plt.Figure:
    """Data, samples, and some paths of the probability flow, on the same axes."""
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.6), sharex=True, sharey=True, layout="constrained")
    for axes, points, title in ((panels[0], data, "data"), (panels[1], paths[-1], "samples")):
        axes.scatter(*points[:, :2].T, s=1.5, linewidths=0, color="tab:blue")
        axes.set_title(title)
    some = paths[:, :60, :2]
    panels[2].plot(some[:, :, 0], some[:, :, 1], color="0.6", linewidth=0.6)
    panels[2].scatter(*some[0].T, s=5, color="tab:orange", label="noise", zorder=2)
    panels[2].scatter(*some[-1].T, s=5, color="tab:blue", label="samples", zorder=3)
    panels[2].set_title("probability flow")
    panels[2].legend(fontsize="small", markerscale=2)
    low, high = data[:, :2].quantile(0.001, dim=0), data[:, :2].quantile(0.999, dim=0)
    margin = 0.15 * (high - low)
    panels[0].set_xlim(float(low[0] - margin[0]), float(high[0] + margin[0]))
    panels[0].set_ylim(float(low[1] - margin[1]), float(high[1] + margin[1]))
    return figure
