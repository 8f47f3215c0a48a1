"""Draw the figures of the docs from the records in `benchmarks/results/` and the models of `benchmarks.toys table4`.

python -m benchmarks.figures [frontier lambda generation few_steps bridges_time]
"""

import argparse
import json
from itertools import cycle
from typing import Any

import matplotlib
import torch
from torch import Tensor

from diffusers_vsdm import VSDMPipeline, VSDMScheduler, process
from diffusers_vsdm.data import sample_toy
from diffusers_vsdm.trainer.report import flow_paths

from .tables import RESULTS, ROOT, by_name
from .toys import KEPT


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


TOYS = ("spiral-8y", "checkerboard-6x")
SUBSTEPS = {6: 18, 8: 16}  # the authors' program: 108 and 128 network calls for 6 and 8 "evaluations"


def save(figure: Any, name: str) -> None:
    """Write a figure of the docs."""
    figure.savefig(ROOT / "docs" / name, dpi=110, metadata={"Software": None})
    plt.close(figure)


def load(toy: str, method: str) -> VSDMPipeline:
    """A model that `benchmarks.toys table4` left."""
    pipeline = VSDMPipeline.from_pretrained(ROOT / KEPT["table4"] / f"{toy}-{method}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_lambda() -> None:
    """Lambda times beta_max over the stages, every seed of the paper's setting (its Figure 9)."""
    record = json.loads((RESULTS / "toys_table4.json").read_text())
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axes, dataset in zip(panels, TOYS, strict=True):
        axes.set_title(dataset)
        axes.set_xlabel("stage of stochastic approximation")
        colours = cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
        for name, runs in by_name(record).items():
            if not name.startswith(dataset) or "SGM" in name:
                continue
            for i, axis in enumerate("xy"):
                colour = next(colours)
                for seed, run in enumerate(runs):
                    path = [stage[i] for stage in run["lambda_beta_max_per_stage"]]
                    label = f"{name.split()[1]}, {axis}" if seed == 0 else None
                    axes.plot(path, color=colour, linewidth=1, alpha=0.8, label=label)
                    axes.plot(len(path) - 1, run["lambda_beta_max"][i], "o", color=colour, markersize=4)
        axes.legend(fontsize="small")
    panels[0].set_ylabel(r"$\lambda \, \beta_{\max}$ (dots: the average, frozen)")
    panels[0].set_ylim(bottom=0)
    save(figure, "lambda_paper.png")


def draw_generation() -> None:
    """Samples and paths of the probability flow in the paper's setting (its Figures 2, 3, 7 and 8)."""
    methods = ("SGM-20", "VSDM-10")
    figure, panels = plt.subplots(2, 5, figsize=(15, 6), layout="constrained")
    for row, toy in zip(panels, TOYS, strict=True):
        data = sample_toy(toy, 3000, torch.Generator().manual_seed(0))
        drawn = {"data": data}
        drawn |= {method: flow_paths(load(toy, method), 3000, 99)[0] for method in methods}
        limits = [(1.25 * float(data[:, i].min()), 1.25 * float(data[:, i].max())) for i in (0, 1)]
        for axes, (title, points) in zip(row[:3], drawn.items(), strict=True):
            axes.scatter(*(points if title == "data" else points[-1]).T, s=1.2, linewidths=0)
            axes.set_title(f"{toy}: {title}")
        for axes, method in zip(row[3:], methods, strict=True):
            some = drawn[method][:, :80].numpy()
            axes.plot(some[..., 0], some[..., 1], color="0.6", linewidth=0.6)
            axes.scatter(*some[0].T, s=5, color="tab:orange", zorder=2)
            axes.scatter(*some[-1].T, s=5, color="tab:blue", zorder=3)
            axes.set_title(f"{method}: paths")
        for axes in row:
            axes.set_xlim(*limits[0])
            axes.set_ylim(*limits[1])
    save(figure, "table4_paths.png")


def few_steps(pipeline: VSDMPipeline, outer: int, inner: int) -> Tensor:
    """Euler's method on raw axes: `outer` intervals of `inner` steps, one time for all network calls in an interval.

    `inner` of 1 is what 6 or 8 evaluations mean; more is what the authors' program does.
    """
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(outer)
    x = scheduler.sample_prior((3000, 2), generator=torch.Generator().manual_seed(1))
    lam = scheduler.drift.lam.float()
    times = torch.linspace(len(scheduler) - 1, 0, outer + 1).round().long().tolist()
    with torch.no_grad():
        for k, k_next in zip(times[:-1], times[1:], strict=True):
            dg = float(scheduler.integrated_beta[k] - scheduler.integrated_beta[k_next]) / inner
            for _ in range(inner):
                score = scheduler.get_score(pipeline.unet(scheduler.scale_model_input(x, k), k).sample, k, x)
                x = x - dg * process.ode_drift(lam, x, score)
    return x


def draw_few_steps() -> None:
    """Six and eight evaluations (Figures 10 and 11), as they are and as the authors' program counts them."""
    figure, panels = plt.subplots(4, 4, figsize=(12, 11), layout="constrained")
    rows = [(toy, method) for toy in TOYS for method in ("SGM-20", "VSDM-20")]
    for row, (toy, method) in zip(panels, rows, strict=True):
        pipeline, data = load(toy, method), sample_toy(toy, 3000, torch.Generator().manual_seed(0))
        columns = [(6, 1), (8, 1), (6, SUBSTEPS[6]), (8, SUBSTEPS[8])]
        for axes, (outer, inner) in zip(row, columns, strict=True):
            axes.scatter(*few_steps(pipeline, outer, inner).T, s=1.2, linewidths=0)
            axes.set_title(f"{method}: {outer * inner} calls")
            axes.set_xlim(1.3 * float(data[:, 0].min()), 1.3 * float(data[:, 0].max()))
            axes.set_ylim(1.3 * float(data[:, 1].min()), 1.3 * float(data[:, 1].max()))
    save(figure, "few_evaluations.png")


def draw_frontier() -> None:
    """Straightness against W2 on spiral-8y: VSDM and SGM in every setting measured, flow matching, the paper's."""
    widths = (2.09, 18.7)  # of spiral-8y, as in the paper's table

    def point(straightness: list[float], w2: float) -> tuple[float, float]:
        return sum(s / w for s, w in zip(straightness, widths, strict=True)) / 2, w2

    points: dict[str, list[tuple[float, float, str]]] = {}
    for file in ("toys_table4", "toys_standardized", "toys_default", "toys_search"):
        record = json.loads((RESULTS / f"{file}.json").read_text())
        for name, runs in by_name(record).items():
            if not runs or "checkerboard" in name or "weighting" in name:
                continue
            raw = file == "toys_table4" or "standardize False" in name
            kind = f"{'SGM' if 'SGM' in name else 'VSDM'}, {'raw axes' if raw else 'standardised'}"
            for run in runs:
                label = name.replace("spiral-8y ", "") if file == "toys_table4" else ""
                if file == "toys_search":
                    change = name.split(": ")[1]
                    label = "marginal prior" if change == "standardize False" else ""
                    label = f"β {float(change.split()[1]):g}" if "beta_max" in change else label
                points.setdefault(kind, []).append((*point(run["straightness"], run["w2_standardized"]), label))
    for run in json.loads((RESULTS / "methods.json").read_text())["runs"]:
        if run["data"] == "spiral-8y" and "CFM" in run["name"]:
            metrics = run["metrics"]
            points.setdefault(run["name"], []).append((*point(metrics["straightness"], metrics["w2_100"]), ""))
    # the authors' published samples of VSDM-10
    points["VSDM-10, the authors' samples"] = [(*point([4.7, 31.0], 0.43), ""), (*point([5.9, 39.0], 0.52), "")]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, places in points.items():
        drawn = axes.scatter([x for x, *_ in places], [y for _, y, _ in places], s=16, label=kind)
        for label in sorted({label for *_, label in places} - {""}):
            x, y, _ = next(place for place in places if place[2] == label)
            axes.annotate(
                label, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=drawn.get_facecolor()[0]
            )
    axes.set_xlabel("straightness, mean of both axes over their widths")
    axes.set_ylabel("W2, about 100 calls")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    save(figure, "frontier.png")


def draw_bridges_time() -> None:
    """W2 on spiral-8y against the seconds of training, by the number of gradient steps."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    problem = "spiral-8y, "
    record = by_name(json.loads((RESULTS / "bridges_toys.json").read_text()))
    for method in ("VSDM, beta_max 10", "SB-FBSDE, matching", "SB-FBSDE, alternating"):
        runs = [run for name, runs in record.items() if name.startswith(problem + method) for run in runs]
        axes.plot(*zip(*sorted((run["seconds"], run["w2_sde"]) for run in runs), strict=True), "o-", label=method)
    (floor,) = {run["w2_floor"] for name, runs in record.items() if name.startswith(problem) for run in runs}
    axes.axhline(floor, color="gray", linestyle=":", label="two samples of the data")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="W2, SDE", ylim=(0, None))
    axes.legend(fontsize="small")
    save(figure, "bridges_time.png")


DRAWINGS = {
    "frontier": draw_frontier,
    "lambda": draw_lambda,
    "generation": draw_generation,
    "few_steps": draw_few_steps,
    "bridges_time": draw_bridges_time,
}


def main() -> None:
    """Draw those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=DRAWINGS)
    for name in parser.parse_args().names or DRAWINGS:
        DRAWINGS[name]()


if __name__ == "__main__":
    main()
