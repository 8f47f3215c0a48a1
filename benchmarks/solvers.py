"""Errors of the flow map in few evaluations, ours beside Diffusers' schedulers, on problems with exact scores.

    python -m benchmarks.solvers fixed  # four problems
    python -m benchmarks.solvers drawn  # six problems of each of their families, lambda 1, nothing known

The problems are `benchmarks` of `tests/problems.py`, on DDPM's linear table. The error of a sample is its distance to
the end of its path of the probability flow (exact for a Gaussian, in 1,000 steps for a mixture), in units of the
standard deviation of the data. Diffusers' schedulers get the exact score at the noise level that they step from, also
where they would round its time for a network. Three processes are compared:

- `neutral`: lambda 1, nothing known of the data. All start from the same noise.
- `neutral, moments`: lambda 1, with the data's mean and variance in the drift, as `fit_moments` leaves it.
- `learned`: lambda of `StochasticApproximation` at its defaults, with the moments.

The last two start from the marginal prior, and only our solvers can use them. Writes
`benchmarks/results/solvers_fixed.json`, or `solvers_drawn.json` with geometric means over the draws.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
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

from diffusers_vsdm import AdaptiveDiagonalDrift, StochasticApproximation, VSDMScheduler, process
from diffusers_vsdm.solvers import SOLVERS
from diffusers_vsdm.trainer.report import versions
from tests.problems import DiagonalGaussian, benchmarks, drawn_benchmarks

from .tables import RESULTS


EVALUATIONS = (5, 6, 8, 10, 20, 50)
STAGES = 40
SAMPLES = {2: 2000, 3072: 64}
DRAWS, DRAWN_SAMPLES = range(100, 106), {2: 500, 3072: 16}
LEAST_G = -9  # power of ten, of the first time of the reference
GRIDS: dict[str, dict[str, Any]] = {
    "trailing": {"time_grid": "spacing", "timestep_spacing": "trailing"},
    "linspace": {"time_grid": "spacing", "timestep_spacing": "linspace"},
    **{name: {"time_grid": name} for name in ("quadratic", "karras", "log_snr_mean")},
}
THEIR_GRIDS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}
Eps = Callable[[Tensor, Tensor], Tensor]
Sample = Callable[[Eps, Tensor, int], Tensor]


def ours(eps: Eps, x: Tensor, calls: int, drift: AdaptiveDiagonalDrift | None = None, **settings: Any) -> Tensor:
    """Samples of VSDMScheduler."""
    scheduler = VSDMScheduler(clip_sample=False, **settings)
    scheduler.set_drift(drift)
    per_step = scheduler.order
    scheduler.set_timesteps((calls + per_step - 1) // per_step)
    for k in scheduler.timesteps:
        x = scheduler.step(eps(x, scheduler.integrated_beta_at(k)), k, x).prev_sample
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
    g = torch.cat([like.integrated_beta_at(like.timesteps), torch.zeros(1, dtype=torch.float64)])
    scheduler = IPNDMScheduler(trained_betas=torch.sqrt(-torch.expm1(-g[:-1])).float().numpy())
    scheduler.set_timesteps(calls)
    for i, k in enumerate(scheduler.timesteps):
        x = scheduler.step(eps(x, g[i]), k, x).prev_sample
    return x


def our_variants(drift: AdaptiveDiagonalDrift | None) -> dict[str, Sample]:
    """By name: every solver, order and grid."""
    found = {}
    for name, solver in SOLVERS.items():
        for order, (grid, settings) in itertools.product(solver.rules, GRIDS.items()):
            chosen = {"solver": name, "solver_order": order, "drift": drift} | settings
            if not solver.stochastic:
                found[f"{name} {order}, {grid}"] = lambda e, x, n, c=chosen: ours(e, x, n, **c)
    return found


def their_variants() -> dict[str, Sample]:
    """By name: schedulers of Diffusers with their options."""
    found: dict[str, Any] = {}
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
            found[f"{label}, {grid}"] = lambda e, x, n, s=scheduler, c=chosen: theirs(e, x, n, s, **c)
    for grid, settings in GRIDS.items():
        found[f"IPNDM, {grid}"] = lambda e, x, n, c=settings: ipndm(e, x, n, c)
    return found


def moments(problem: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the data in each dimension."""
    if isinstance(problem, DiagonalGaussian):
        return problem.mean, problem.variance
    return problem.means.mean(0), problem.variance + problem.means.var(0, correction=0)


def reference(problem: Any, x: Tensor, g: Tensor, drift: AdaptiveDiagonalDrift | None = None) -> Tensor:
    """Where the probability flow takes `x`."""
    if isinstance(problem, DiagonalGaussian):
        return problem.flow(x.double(), g, torch.zeros((), dtype=torch.float64))
    # DDPM's own table begins so far from the data that the last step would err by more than fifty calls do
    table = torch.logspace(LEAST_G, float(g.log10()), 1000, dtype=torch.float64)
    betas = -torch.expm1(-table.diff(prepend=torch.zeros(1, dtype=torch.float64)))
    settings = {"solver": "dpmsolver++", "solver_order": 3, "time_grid": "log_snr_mean", "drift": drift}
    return ours(problem.eps, x.double(), 1000, trained_betas=betas.tolist(), **settings)


def drift_for(problem: Any, table: Tensor, stages: int) -> AdaptiveDiagonalDrift:
    """A drift with the data's moments, and lambda of so many stages with the exact score."""
    mean, variance = moments(problem)
    drift = AdaptiveDiagonalDrift(tuple(mean.shape))
    drift.data_mean.copy_(mean)
    drift.data_variance.copy_(variance)
    learning = StochasticApproximation(drift, table, seed=0)
    for _ in range(stages):
        now = dataclasses.replace(problem, lam=drift.lam.clone())
        learning.update(lambda x, k, now=now: (-now.eps(x, table[k]) / process.std(now.lam, table[k])).float())
    if stages:
        drift.set_lambda(drift.average())
    return drift


def errors_of(sample: Sample, problem: Any, x: Tensor, end: Tensor) -> dict[str, tuple[float, float]]:
    """By number of calls: mean distance from where the flow ends, in the data's deviation, and its standard error."""

    def eps(x: Tensor, g: Tensor) -> Tensor:
        return problem.eps(x, g).to(x.dtype)

    scale, found = moments(problem)[1].mean().sqrt(), {}
    for calls in EVALUATIONS:
        error = (sample(eps, x, calls).double() - end).square().mean(1).sqrt() / scale
        found[str(calls)] = float(error.mean()), float(error.std()) / math.sqrt(len(error))
    return found


def study_fixed(table: Tensor) -> list[dict[str, Any]]:
    """Every variant on every problem."""
    runs = []
    for name, problem in benchmarks().items():
        mean, variance = moments(problem)
        noise = torch.randn((SAMPLES[len(mean)], len(mean)), generator=torch.Generator().manual_seed(0))
        for process_name, stages in (("neutral", None), ("neutral, moments", 0), ("learned", STAGES)):
            drift = None if stages is None else drift_for(problem, table, stages)
            now, x = problem, noise
            if drift is not None:
                now = dataclasses.replace(problem, lam=drift.lam.clone())
                at_noise = process.marginal_moments(drift.lam, table[-1], mean, variance)
                x = (at_noise[0] + at_noise[1].sqrt() * noise).float()
            end = reference(now, x, table[-1], drift)
            variants = {"ours": our_variants(drift)} | ({} if drift else {"Diffusers": their_variants()})
            for whose, each in variants.items():
                for variant, sample in each.items():
                    metrics = rounded(errors_of(sample, now, x, end))
                    runs.append(
                        {"name": variant, "problem": name, "process": process_name, "whose": whose, "metrics": metrics}
                    )
            print(name, process_name, "" if drift is None else drift.lam.aminmax(), flush=True)
    return runs


def study_drawn(table: Tensor) -> list[dict[str, Any]]:
    """Every variant on every family: the geometric mean over its draws, with that of the mean's standard error."""
    logs: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for seed in DRAWS:
        for name, problem in drawn_benchmarks(seed).items():
            d = len(problem.lam)
            x = torch.randn((DRAWN_SAMPLES[d], d), generator=torch.Generator().manual_seed(seed))
            end = reference(problem, x, table[-1])
            for whose, each in {"ours": our_variants(None), "Diffusers": their_variants()}.items():
                for variant, sample in each.items():
                    for calls, (mean, _) in errors_of(sample, problem, x, end).items():
                        logs.setdefault((variant, name, whose), {}).setdefault(calls, []).append(math.log(mean))
        print(seed, flush=True)
    return [
        {
            "name": variant,
            "problem": name,
            "process": "neutral",
            "whose": whose,
            "metrics": rounded({calls: geometric(each) for calls, each in by_calls.items()}),
        }
        for (variant, name, whose), by_calls in logs.items()
    ]


def geometric(logs: list[float]) -> tuple[float, float]:
    """Geometric mean, and its standard error."""
    mean = math.exp(statistics.mean(logs))
    return mean, mean * statistics.stdev(logs) / math.sqrt(len(logs))


def rounded(metrics: dict[str, tuple[float, float]]) -> dict[str, list[float]]:
    """To four digits."""
    return {calls: [float(f"{number:.3e}") for number in pair] for calls, pair in metrics.items()}


STUDIES = {"fixed": study_fixed, "drawn": study_drawn}


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args().study
    warnings.filterwarnings("ignore")
    record = {
        "command": f"python -m benchmarks.solvers {study}",
        "versions": versions() | {"numpy": np.__version__},
        "runs": STUDIES[study](VSDMScheduler().integrated_beta),
    }
    (RESULTS / f"solvers_{study}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
