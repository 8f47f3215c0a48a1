"""Pictures of a model: its samples, the paths to them, and the drift over the stages."""

import math
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from ..pipelines import VSDMPipeline


# far from the seeds that users give to training
EVALUATION_SEED = 1_000_003
FEW = 8  # so many lambdas are drawn or listed one by one
LEAST_SIDE = 512  # pixels; smaller grids are enlarged by a whole number


def picture_samples(pipeline: VSDMPipeline, num_samples: int, num_steps: int | None = None) -> Image.Image:
    """Samples of a model: a grid of images as nearly square as can be, or the first two dimensions of vectors.

    A network that knows classes shows them in turn, without guidance.

    Args:
        pipeline: The model; its scheduler's timesteps are set anew.
        num_samples: Number of samples.
        num_steps: Steps of the solver; by default the pipeline's.

    Returns:
        A picture in RGB. Images whose channels are neither gray nor colours show their first channel.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(pipeline.unet.device).manual_seed(EVALUATION_SEED)
    labels = [i % pipeline.num_classes for i in range(num_samples)] if pipeline.num_classes else None
    (samples,) = pipeline(num_samples, generator, num_steps, output_type="np", return_dict=False, class_labels=labels)
    if samples.ndim == 2:
        figure = _figure(4.5, 4.5)
        axes = figure.subplots()
        axes.scatter(samples[:, 0], samples[:, 1], s=1.5, linewidths=0, color="tab:blue")
        return _as_picture(figure)
    return picture_grid(samples)


def picture_grid(images: np.ndarray) -> Image.Image:
    """Images `(n, H, W, C)` in [0, 1] in a grid as nearly square as can be; their first channel unless 3."""
    shown = images if images.shape[-1] == 3 else images[..., :1]
    rows = max(n for n in range(1, math.isqrt(len(shown)) + 1) if len(shown) % n == 0)
    grid = make_image_grid(VSDMPipeline.numpy_to_pil(shown), rows, len(shown) // rows)
    scale = math.ceil(LEAST_SIDE / max(grid.size))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def _figure(width: float, height: float) -> Any:
    """An empty figure; pyplot, and with it the user's choice of a backend, is left alone."""
    from matplotlib.figure import Figure  # here, since training does without these 20 MB

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _as_picture(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def summary(lam: Tensor) -> list[float]:
    """Lambda itself where it is short, else its quantiles 0, 1/4, 1/2, 3/4 and 1."""
    flat = lam.flatten()
    return (flat if len(flat) <= FEW else flat.quantile(torch.linspace(0, 1, 5, dtype=flat.dtype))).tolist()


def picture_fidelity(rows: list[dict[str, Any]], measure: str, name: str) -> Image.Image:
    """A measure of samples against the network calls that they took, a line for each solver.

    Args:
        rows: Of [`FidelityReport`].
        measure: A key of theirs.
        name: Of the axis.
    """
    figure = _figure(5, 3.4)
    axes = figure.subplots()
    for solver in dict.fromkeys(row["run"].split("@")[0] for row in rows):
        points = sorted((row["evaluations"], row[measure]) for row in rows if row["run"].split("@")[0] == solver)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=solver)
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=name)
    axes.legend(fontsize="small")
    return _as_picture(figure)


def picture_drift(lambdas: Tensor, final: Tensor, unit: str = "", varies: bool = False) -> Image.Image:
    r"""$\lambda$ (times a `unit`) over the stages as Figure 9 of the paper: each dimension, or quantiles of many.

    Args:
        lambdas: After each stage, `(stages + 1, *lambda_shape)`.
        final: What it was frozen at.
        unit: What both were multiplied by, as the axis says it, in TeX.
        varies: Whether the first dimension of a $\lambda$ is time: then the final one is drawn over time.
    """
    one = final[0] if varies else final
    dimensions = [f"dimension {i}" for i in range(one.numel())]
    names = dimensions if one.numel() <= FEW else ["least", "1/4", "median", "3/4", "largest"]
    figure = _figure(5, 3.2)
    axes = figure.subplots()
    columns = zip(*(summary(row) for row in (final if varies else lambdas)), strict=True)
    lines = [axes.plot(values, label=name)[0] for name, values in zip(names, columns, strict=True)]
    if varies:
        axes.set_xlabel("training time")
        axes.legend(fontsize="small")
    else:
        for line, end in zip(lines, summary(final), strict=True):
            axes.axhline(end, color=line.get_color(), linestyle=":", linewidth=1)
        axes.set_xlabel("stage of stochastic approximation")
        axes.legend(title="dotted: average, frozen", fontsize="small", title_fontsize="small")
    axes.set_ylabel(rf"$\lambda \, {unit}$" if unit else r"$\lambda$")
    axes.set_ylim(bottom=0)
    return _as_picture(figure)


def picture_paths(data: Tensor, paths: Tensor, title: str = "probability flow", start: str = "noise") -> Image.Image:
    """Data, samples, and some paths to them, on the same axes.

    Args:
        data: `(n, d)`.
        paths: `(num_times, n, d)`, from noise to samples.
        title: What paths they are.
        start: What they start from.
    """
    low, high = (data[:, :2].quantile(q, dim=0).tolist() for q in (0.001, 0.999))
    some = paths[:, :60, :2].numpy()
    figure = _figure(10.5, 3.6)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, points, name in zip(panels, (data.numpy(), paths[-1].numpy()), ("data", "samples"), strict=False):
        axes.scatter(*points[:, :2].T, s=1.5, linewidths=0, color="tab:blue")
        axes.set_title(name)
    panels[2].plot(some[:, :, 0], some[:, :, 1], color="0.6", linewidth=0.6)
    panels[2].scatter(*some[0].T, s=5, color="tab:orange", label=start, zorder=2)
    panels[2].scatter(*some[-1].T, s=5, color="tab:blue", label="samples", zorder=3)
    panels[2].set_title(title)
    panels[2].legend(fontsize="small", markerscale=2)
    for limits, least, most in ((panels[0].set_xlim, low[0], high[0]), (panels[0].set_ylim, low[1], high[1])):
        margin = 0.15 * (most - least)
        limits(least - margin, most + margin)
    return _as_picture(figure)
