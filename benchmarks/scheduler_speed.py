"""Time of `step` and `add_noise` beside Diffusers' schedulers.

    python -m benchmarks.scheduler_speed

Every pair is timed in five interleaved runs of whole sampling loops without a network; entries are ratios of medians,
ours over theirs. Writes `benchmarks/results/scheduler_speed.json`.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMScheduler
from diffusers_vsdm.trainer.report import versions

from .tables import RESULTS


SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (4, 4, 128, 128), (8, 16, 128, 128))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
DRIFTS = ("neutral", "per channel", "per element", "per element, dct")
STEPS, RUNS = 20, 5
LEAST_SECONDS = 0.2  # of a run, so that small ones are not lost in the clock's noise


def drift_for(kind: str, shape: tuple[int, ...]) -> AdaptiveDiagonalDrift | None:
    """A drift that is not neutral, but for the first kind."""
    if kind == "neutral":
        return None
    event = shape[1:]
    lambda_shape = (event[0], 1, 1) if kind == "per channel" else event
    drift = AdaptiveDiagonalDrift(event, lambda_shape, basis="dct" if kind.endswith("dct") else "identity")
    drift.set_lambda(torch.linspace(0.5, 1.5, drift.lam.numel(), dtype=torch.float64).reshape(lambda_shape))
    return drift


def loop(scheduler: Any, sample: torch.Tensor, output: torch.Tensor) -> Callable[[], None]:
    """A sampling loop; the tables are made in `set_timesteps` or at the first step, which is not timed."""

    def run() -> None:
        scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None
        for k in scheduler.timesteps:
            scheduler.step(output, k, sample, return_dict=False)

    return run


def ratio(ours: Callable[[], None], theirs: Callable[[], None]) -> float:
    """Of the medians of interleaved runs."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for function in (ours, theirs):
        function()
    started = time.perf_counter()
    theirs()
    repeats = max(1, round(LEAST_SECONDS / (time.perf_counter() - started)))
    for _ in range(RUNS):
        for which, function in enumerate((ours, theirs)):
            started = time.perf_counter()
            for _ in range(repeats):
                function()
            times[which].append((time.perf_counter() - started) / repeats)
    return statistics.median(times[0]) / statistics.median(times[1])


def main() -> None:
    """Every shape, type, pair and drift."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    runs = []
    for shape in SHAPES:
        for dtype_name, dtype in DTYPES.items():
            sample, output = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            times = torch.randint(1000, shape[:1])
            for kind in DRIFTS:
                drift, metrics = drift_for(kind, shape), {}
                for solver, (stock, settings) in PAIRS.items():
                    theirs = stock(**settings)
                    ours = VSDMScheduler.from_config(theirs.config, solver=solver, clip_sample=False)
                    ours.set_drift(drift)
                    theirs.set_timesteps(STEPS)
                    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
                    metrics[f"step, {solver}"] = ratio(loop(ours, sample, output), loop(theirs, sample, output))
                    adds = (partial(scheduler.add_noise, sample, output, times) for scheduler in (ours, theirs))
                    metrics[f"add_noise, {solver}"] = ratio(*adds)
                runs.append({"name": f"{shape}, {dtype_name}, {kind}", "metrics": metrics})
                print(runs[-1]["name"], {key: round(value, 2) for key, value in metrics.items()}, flush=True)
    record = {
        "command": "python -m benchmarks.scheduler_speed",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "runs": runs,
    }
    (RESULTS / "scheduler_speed.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
