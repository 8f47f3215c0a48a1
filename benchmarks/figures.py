"""Draw the figures of the docs from the records in `benchmarks/results/`.

python -m benchmarks.figures
"""

import json
from itertools import cycle

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .tables import RESULTS, ROOT, by_name  # noqa: E402


def draw_lambda() -> None:
    """Lambda times beta_max over the stages, every seed of the paper's setting (its Figure 9)."""
    record = json.loads((RESULTS / "toys_paper.json").read_text())
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axes, dataset in zip(panels, ("spiral-8y", "checkerboard-6x"), strict=True):
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
    figure.savefig(ROOT / "docs" / "lambda_paper.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw_lambda()
