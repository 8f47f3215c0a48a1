"""Errors of the flow map in few evaluations, ours beside Diffusers' schedulers, on problems with exact scores.

    python -m benchmarks.solvers

The problems are `benchmarks` of `tests/problems.py`, on DDPM's linear table. All start from the same noise at its last
time; the error of a sample is its distance to the end of its path of the probability flow (exact for a Gaussian, in
1,000 steps for a mixture), in units of the data's standard deviation. Diffusers' schedulers get the exact score at the
noise level that they step from, also where they would round its time for a network. Writes
`benchmarks/results/solvers.json`.
"""

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffusers_vsdm import VSDMScheduler
from diffusers_vsdm.solvers import SOLVERS
from diffusers_vsdm.trainer.report import versions
from tests.problems import DiagonalGaussian, benchmarks

from .tables import RESULTS


EVALUATIONS = (5, 6, 8, 10, 20, 50)
SAMPLES = {2: 2000, 3072: 64}
GRIDS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    **{name: {"time_grid": name} for name in ("quadratic", "karras", "log_snr_mean")},
}
THEIR_GRIDS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}
Eps = Callable[[Tensor, Tensor], Tensor]


def ours(eps: Eps, x: Tensor, calls: int, **settings: Any) -> Tensor | None:
    """Samples of VSDMScheduler; None if the solver cannot make so few calls."""
    scheduler = VSDMScheduler(clip_sample=False, **settings)
    per_step = scheduler.order
    scheduler.set_timesteps((calls + per_step - 1) // per_step)
    times = scheduler._g(scheduler._grid, torch.ones(()))
    for i, k in enumerate(scheduler.timesteps):
        g = times[(i + per_step - 1) // per_step]
        x = scheduler.step(eps(x, g), k, x).prev_sample
    return x


def theirs(eps: Eps, x: Tensor, calls: int, stock: type, **settings: Any) -> Tensor:
    """Samples of a scheduler of Diffusers, whose own noise levels the score is taken at."""
    scheduler = stock(**settings)
    per_step = 2 if stock is HeunDiscreteScheduler else 1
    scheduler.set_timesteps((calls + per_step - 1) // per_step)
    in_sigma = stock is HeunDiscreteScheduler  # its samples are x / a
    if in_sigma:
        x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    for i, k in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "sigmas"):
            g = torch.log1p(scheduler.sigmas[i].double() ** 2)
        else:
            g = -scheduler.alphas_cumprod[int(k)].double().log()
        output = eps(scheduler.scale_model_input(x, k), g)
        x = scheduler.step(output, k, x).prev_sample
    return x


def ipndm(eps: Eps, x: Tensor, calls: int, grid: dict[str, Any]) -> Tensor:
    """IPNDMScheduler takes its noise levels as `trained_betas`; it starts with lower orders and needs four calls."""
    like = VSDMScheduler(**grid)
    like.set_timesteps(calls)
    g = like._g(like._grid, torch.ones(()))
    scheduler = IPNDMScheduler(trained_betas=torch.sqrt(-torch.expm1(-g[:-1])).float().numpy())
    scheduler.set_timesteps(calls)
    for i, k in enumerate(scheduler.timesteps):
        x = scheduler.step(eps(x, g[i]), k, x).prev_sample
    return x


def variants() -> dict[str, tuple[str, Callable[[Eps, Tensor, int], Tensor]]]:
    """By name: whose it is, and how it samples."""
    found: dict[str, tuple[str, Any]] = {}
    for name, solver in SOLVERS.items():
        if solver.stochastic:
            continue
        for order, (grid, settings) in itertools.product(solver.rules, GRIDS.items()):
            chosen = {"solver": name, "solver_order": order} | settings
            found[f"{name} {order}, {grid}"] = ("ours", lambda e, x, n, c=chosen: ours(e, x, n, **c))
    stock = {
        "DDIM": (DDIMScheduler, [{"clip_sample": False, "set_alpha_to_one": True}], ("trailing", "linspace")),
        "DPMSolverMultistep": (
            DPMSolverMultistepScheduler,
            [{"solver_order": order} for order in (2, 3)],
            ("trailing", "linspace", "karras", "exponential"),
        ),
        "UniPC": (
            UniPCMultistepScheduler,
            [{"solver_order": order} for order in (2, 3)],
            ("trailing", "linspace", "karras", "exponential"),
        ),
        "DEIS": (
            DEISMultistepScheduler,
            [{"solver_order": order} for order in (2, 3)],
            ("trailing", "linspace", "karras", "exponential"),
        ),
        "Heun": (HeunDiscreteScheduler, [{}], ("trailing", "linspace", "karras", "exponential")),
    }
    for name, (scheduler, options, grids) in stock.items():
        for option, grid in itertools.product(options, grids):
            label = f"{name} {option.get('solver_order', '')}".strip()
            chosen = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"} | option | THEIR_GRIDS[grid]
            found[f"{label}, {grid}"] = (
                "Diffusers",
                lambda e, x, n, s=scheduler, c=chosen: theirs(e, x, n, s, **c),
            )
    for grid, settings in GRIDS.items():
        found[f"IPNDM, {grid}"] = ("Diffusers", lambda e, x, n, c=settings: ipndm(e, x, n, c))
    return found


def reference(problem: Any, x: Tensor, g: Tensor) -> Tensor:
    """Where the probability flow takes `x`."""
    if isinstance(problem, DiagonalGaussian):
        return problem.flow(x.double(), g, torch.zeros((), dtype=torch.float64))
    return ours(problem.eps, x.double(), 1000, solver="dpmsolver++", solver_order=3, time_grid="log_snr_mean")


def main() -> None:
    """Every variant on every problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    runs: list[dict[str, Any]] = []
    g = VSDMScheduler().integrated_beta[-1]
    for name, problem in benchmarks().items():
        d = problem.variance.numel()
        x = torch.randn((SAMPLES[d], d), generator=torch.Generator().manual_seed(0))
        spread = problem.variance
        if not isinstance(problem, DiagonalGaussian):
            spread = spread + problem.means.var(0, correction=0)

        def eps(x: Tensor, g: Tensor, problem: Any = problem) -> Tensor:
            return problem.eps(x, g).to(x.dtype)

        end = reference(problem, x, g)
        for variant, (whose, sample) in variants().items():
            errors = {}
            for calls in EVALUATIONS:
                error = (sample(eps, x, calls).double() - end).square().mean(1).sqrt() / spread.mean().sqrt()
                errors[str(calls)] = [float(error.mean()), float(error.std() / math.sqrt(len(error)))]
            runs.append({"name": variant, "problem": name, "whose": whose, "metrics": errors})
        for calls in map(str, EVALUATIONS):
            line = [name, calls]
            for whose in ("ours", "Diffusers"):
                errors = [
                    (r["metrics"][calls], r["name"]) for r in runs if (r["problem"], r["whose"]) == (name, whose)
                ]
                (mean, deviation), variant = min(errors)
                line.append(f"{whose}: {variant} {mean:.2e} ({deviation:.0e})")
            print(*line, sep="; ", flush=True)
    record = {
        "command": "python -m benchmarks.solvers",
        "versions": versions() | {"numpy": np.__version__},
        "runs": runs,
    }
    (RESULTS / "solvers.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
