"""What the simulation of stochastic approximation costs in accuracy: E[score x] with the exact score.

    python -m benchmarks.simulation

The score is that of 1,000 points of spiral-8y under the process with beta_max 10 and lambda 0.65 / 1.65. The
trajectories start from N(0, I), and the moment is averaged over time as in `StochasticApproximation`. With zeta 0.75
lambda rises while the moment is above -0.75.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from diffusers_vsdm import process
from diffusers_vsdm.data import sample_toy

from .tables import RESULTS


LAMBDA = (0.65, 1.65)
METHODS = {"Euler-Maruyama (Eq. 22)": (50, 100, 200, 400), "exact posterior": (50, 100, 200, 400)}
NUM_TRAJECTORIES, SEEDS = 2048, (0, 1, 2, 3)


def score(x: Tensor, lam: Tensor, g: Tensor, data: Tensor) -> Tensor:
    """The exact score of the points `data` under the process, at `x`."""
    a, s = process.mean_scale(lam, g).float(), process.std(lam, g).float()
    distance = (x[:, None] - a * data[None]) / s
    weight = torch.softmax(-0.5 * distance.square().sum(-1), dim=1)
    return -(weight[..., None] * distance).sum(1) / s


def moment(method: str, steps: int, seed: int) -> list[float]:
    """The time-averaged E[score_i x_i] along simulated trajectories."""
    data = sample_toy("spiral-8y", 1000, torch.Generator().manual_seed(0))
    lam = torch.tensor(LAMBDA, dtype=torch.float64)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    grid = process.power_law_integrated_beta(t, 0.1, 10.0, 1.7).flip(0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_TRAJECTORIES, 2, generator=generator)
    total = torch.zeros(2)
    for g, g_next in zip(grid, [*grid[1:], torch.zeros_like(grid[0])], strict=True):
        dg, at_x = g - g_next, score(x, lam, g, data)
        total += dg * (at_x * x).mean(0)
        if method == "exact posterior":
            x, variance = process.ancestral_step(lam, g, g_next, x, at_x)
        else:
            x, variance = x - dg * process.sde_drift(lam, x, at_x), dg
        x = (x + variance.sqrt() * torch.randn(x.shape, generator=generator)).float()
    return (total / grid[0]).tolist()


def main() -> None:
    """Measure and write the record."""
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for method, counts in METHODS.items():
        for steps in counts:
            for seed in SEEDS:
                values = moment(method, steps, seed)
                assert all(math.isfinite(value) for value in values)
                runs.append({"name": f"{method}, {steps} steps", "seed": seed, "metrics": {"moment": values}})
            print(runs[-1]["name"], values, flush=True)
    record = {
        "study": "simulation",
        "command": "python -m benchmarks.simulation",
        "versions": {"torch": torch.__version__},
        "configuration": {"lambda": LAMBDA, "num_trajectories": NUM_TRAJECTORIES, "data": "spiral-8y, 1000 points"},
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "simulation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
