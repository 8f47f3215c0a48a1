"""VSDM on Gaussian data beside the Schrödinger bridge, which is known (section 7.1 of the paper).

    python -m benchmarks.gaussian

- `exact score`: iterative proportional fitting of a drift with a lambda for each time, beta = 1; the relative error of
  A_t in L2(dg), both axes together, after each stage.
- `trained score`: the same inside a training run.
- `flow`: beta = 4, the paper's Figure 1. A learned drift at zeta = 1, its probability flow beside that of the bridge
  between the same ends, from the same starts: W2 of the end points, and the root mean squared distance of each to its
  twin. Drawn in `docs/gaussian_bridge.png`.

Writes `benchmarks/results/gaussian.json`.
"""

import argparse
import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from .tables import RESULTS, ROOT
from .workers import run_all


MEAN = torch.tensor([-8.0, 2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 1.0], [1.0, 5.0]], dtype=torch.float64)
N = 100
TRAJECTORIES = {"exact score": 65_536, "trained score": 32_768}
IPF = {"lambda_varies": True, "zeta": 1.0, "sa_update": "ipf", "sa_average": "last"}
STAGES = 4
SEEDS = 5


def errors(lambdas: Tensor, rotation: Tensor, g: Tensor) -> list[float]:
    """Relative errors of A_t = (1 - lambda) / 2 along the axes `rotation`, for each of several lambdas `(N, 2)`."""
    from diffusers_vsdm.bridges import GaussianSchrodingerBridge

    bridge = GaussianSchrodingerBridge(torch.zeros(2), COVARIANCE, float(g[-1]))
    matrices, _ = bridge.forward_score(g - g[0] / 2)  # lambda is that of an interval
    exact = (rotation @ matrices @ rotation.T).diagonal(dim1=1, dim2=2)
    return [math.sqrt(float(((1 - lam) / 2 - exact).square().sum() / exact.square().sum())) for lam in lambdas]


def exact_score(seed: int) -> dict[str, Any]:
    """Stages with the score of the forward process in closed form."""
    from diffusers_vsdm import AdaptiveDiagonalDrift, StochasticApproximation
    from diffusers_vsdm.discrete import DiscreteProcess

    g = torch.arange(1, N + 1, dtype=torch.float64) / N
    variance, axes = torch.linalg.eigh(COVARIANCE)
    drift = AdaptiveDiagonalDrift((2,), basis="dense", num_times=N)
    drift.rotation.copy_(axes.T)
    drift.data_variance.copy_(variance)
    approximation = StochasticApproximation(
        drift, g, zeta=1.0, update="ipf", num_trajectories=TRAJECTORIES["exact score"], seed=seed
    )
    lambdas = []
    for _ in range(STAGES + 2):
        a, s = DiscreteProcess(drift.lam, g, varies=True).scales(torch.arange(N))
        forward = a**2 * variance + s**2
        lambdas.append(
            approximation.update(lambda x, k, v=forward: -((x.double() @ axes / v[k]) @ axes.T).float()).lam
        )
    return {"error": errors(torch.stack(lambdas), axes.T, g)}


def trained_score(seed: int) -> dict[str, Any]:
    """Stages inside a training run on centred data."""
    from diffusers_vsdm.trainer import TrainingConfig, train

    config = TrainingConfig(
        prediction_type="epsilon",
        dataset_name="gaussian-centered",
        basis="dense",
        beta_min=1.0,
        beta_max=1.0,
        sa_stages=STAGES,
        sa_trajectories=TRAJECTORIES["trained score"],
        weighting="likelihood",
        learning_rate=5e-4,
        max_train_steps=10_000,
        seed=seed,
        **IPF,
    )
    result = train(config)
    scheduler = result.pipeline.scheduler
    measured = errors(result.lambdas[1:], scheduler.drift.rotation, scheduler.integrated_beta)
    return {"error": measured, "seconds": result.seconds, "sa_seconds": result.sa_seconds}


def flow(seed: int) -> dict[str, Any]:
    """The probability flow of a trained model and of the bridge between the same ends."""
    from diffusers_vsdm import VSDMPipeline, VSDMScheduler
    from diffusers_vsdm.bridges import GaussianSchrodingerBridge
    from diffusers_vsdm.metrics.transport import wasserstein2
    from diffusers_vsdm.trainer import TrainingConfig, train

    config = TrainingConfig(
        prediction_type="epsilon",
        dataset_name="gaussian",
        basis="dense",
        beta_min=4.0,
        beta_max=4.0,
        zeta=1.0,
        sa_stages=20,
        seed=seed,
    )
    pipeline = train(config).pipeline
    drift = pipeline.scheduler.drift
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver="heun")
    sampler = VSDMPipeline(pipeline.unet, scheduler)
    sampler.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    _, paths = sampler(3000, generator, num_inference_steps=50, return_trajectory=True, return_dict=False)
    paths = paths.double()

    total = float(scheduler.integrated_beta[-1])
    a = torch.linalg.matrix_exp(-0.5 * total * drift.matrix)
    s2 = torch.linalg.solve(drift.matrix, torch.eye(2).double() - a @ a)
    bridge = GaussianSchrodingerBridge(MEAN, COVARIANCE, total, a @ MEAN, a @ COVARIANCE @ a + s2)
    x, of_bridge, steps = paths[0], [paths[0]], 400
    for i in range(steps):
        g, h = total * (1 - i / steps), -total / steps
        k1 = bridge.velocity(x, g)
        k2 = bridge.velocity(x + h / 2 * k1, g + h / 2)
        k3 = bridge.velocity(x + h / 2 * k2, g + h / 2)
        k4 = bridge.velocity(x + h * k3, max(g + h, 0.0))
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        of_bridge.append(x)
    if seed == 0:
        draw(paths, torch.stack(of_bridge))
    return {
        "w2": wasserstein2(paths[-1], x),
        "distance_to_twin": float((paths[-1] - x).square().sum(1).mean().sqrt()),
        "lambda": torch.linalg.eigvalsh(drift.matrix).tolist(),
    }


def draw(paths: Tensor, of_bridge: Tensor) -> None:
    """Both flows, of 60 samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
    titles = ("Gaussian Schrödinger bridge", "VSDM")
    for axes, title, lines in zip(panels, titles, (of_bridge, paths), strict=True):
        lines = lines[:, :60]
        axes.plot(lines[..., 0], lines[..., 1], color="0.6", linewidth=0.6)
        axes.scatter(*lines[0].T, s=6, color="tab:orange", label="noise", zorder=2)
        axes.scatter(*lines[-1].T, s=6, color="tab:blue", label="data", zorder=3)
        axes.set_title(title)
    panels[0].legend(fontsize="small")
    figure.savefig(ROOT / "docs" / "gaussian_bridge.png", dpi=110, metadata={"Software": None})


STUDIES = {"exact score": exact_score, "trained score": trained_score, "flow": flow}


def run(job: tuple[str, int]) -> dict[str, Any]:
    """One study with one seed, in a process of its own."""
    name, seed = job
    result = {"name": name, "seed": seed, "metrics": STUDIES[name](seed)}
    print(result, flush=True)
    return result


def main() -> None:
    """Run all and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STUDIES, help="measure this alone, and keep the rest of the record")
    only = parser.parse_args().only
    from diffusers_vsdm.trainer.report import versions

    started, path = time.perf_counter(), RESULTS / "gaussian.json"
    names = [only] if only else list(STUDIES)
    runs = [] if not only else [old for old in json.loads(path.read_text())["runs"] if old["name"] != only]
    runs += run_all(run, [(name, seed) for name in names for seed in range(SEEDS)])
    minutes = (time.perf_counter() - started) / 60
    record = {"command": "python -m benchmarks.gaussian", "versions": versions(), "runs": runs}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.name}: {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
