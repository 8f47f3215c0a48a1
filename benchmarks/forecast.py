"""VSDM, its score-based model and TimeGrad's DDPM as forecasters of several series: Table 3 of the paper, and speed.

    python -m benchmarks.forecast validation --data DATA --datasets solar    # before the test's windows
    python -m benchmarks.forecast table --data DATA [--datasets exchange ...] [--methods VSDM ...] [--seeds 0 1 2]
    python -m benchmarks.forecast speed --data DATA      # after the table
    python -m benchmarks.forecast calibration --data DATA
    python -m benchmarks.forecast card --data DATA       # the model that ships, exchange's VSDM of the first seed

DATA holds the folder `timeseries`. All methods have the same encoder, network, steps and settings of the data, which
were chosen for the score-based model on windows before the test's; they differ in process, drift and solver. Models
stay in `outputs/forecast/`, and what is there is not trained again. Adds its runs to `forecast.json`,
`forecast_validation.json`, `forecast_speed.json` and `forecast_calibration.json` in `benchmarks/results/`.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_vsdm import VSDMForecastPipeline, VSDMScheduler
from diffusers_vsdm.data.frames import rolling_windows
from diffusers_vsdm.data.series import load_series
from diffusers_vsdm.hub.cards import render_card
from diffusers_vsdm.metrics.forecast import forecast_metrics
from diffusers_vsdm.trainer.forecast import EVALUATION_SEED, ForecastConfig, ForecastTrainer
from diffusers_vsdm.trainer.forecast_report import write_forecast_report
from diffusers_vsdm.trainer.report import versions

from .forecast_baselines import DATASETS
from .tables import RESULTS, ROOT
from .workers import run_all


WORK = ROOT / "outputs" / "forecast"
SAMPLES = 100
METHODS: dict[str, dict[str, Any]] = {
    "VSDM": {},
    # lambda sinks: as long a process as the others have
    "VSDM, beta_max 25": {"beta_max": 25.0},
    "SGM": {"baseline": "sgm"},
    "VSDM, dense": {"basis": "dense"},
    "SGM, dense": {"baseline": "sgm", "basis": "dense"},
    # TimeGrad's process
    "DDPM": {
        "baseline": "sgm",
        "ddpm_beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.1,
        "ddpm_num_steps": 150,
        "prior_type": "conditional",
        "solver": "ddpm",
    },
}
# solver and steps at each time; the first ones are the method's own
SAMPLERS: dict[str, tuple[tuple[str, int], ...]] = dict.fromkeys(METHODS, (("trig", 10), ("trig", 6), ("trig", 30)))
SAMPLERS["DDPM"] = (("ddpm", 150), ("trig", 10), ("trig", 6))
NAMES = {"exchange": "exchange_rate_nips"}  # that GluonTS knows it by
COMMON: dict[str, Any] = {"prediction_type": "epsilon", "sa_stages": 30, "sa_trajectories": 128}
LARGE = {"max_train_steps": 3000, "train_batch_size": 8, "learning_rate": 2e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "exchange": {"differencing": 1, "max_train_steps": 1500, "train_batch_size": 32},
    "electricity": LARGE,
    "electricity-138": LARGE,
    "electricity-15min": LARGE,
    "solar": LARGE | {"season_length": 10, "differencing": 10, "input_dropout": 0.7},
}


VALIDATION_WINDOWS = 30
# that validation is between
CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "SGM": tuple({"input_dropout": share} for share in (0.0, 0.5, 0.7, 0.8)),
    "VSDM": ({"beta_max": 25.0},),
    "VSDM, dense": ({"beta_max": 20.0, "prediction_type": "v_prediction"},),
}


def series(dataset: str, data: Path) -> Any:
    """The frame of a data set."""
    chosen = DATASETS[dataset]
    return load_series(str(data / "timeseries" / chosen.file), **chosen.options)


def model(
    dataset: str, method: str, seed: int, frame: Any, windows: int, **change: Any
) -> tuple[VSDMForecastPipeline, dict[str, Any]]:
    """A pipeline that was trained on what comes before the last windows, and its record."""
    choice = "".join(f"-{key}-{value}" for key, value in change.items())
    folder = WORK / f"{dataset}-{method.lower().replace(', ', '-')}{choice}-{seed}"
    if not (folder / "metrics.json").exists():
        config = ForecastConfig(
            dataset_name=NAMES.get(dataset, dataset),
            output_dir=str(folder),
            prediction_length=DATASETS[dataset].horizon,
            num_test_windows=windows,
            num_eval_samples=SAMPLES,
            seed=seed,
            **(COMMON | SETTINGS[dataset] | METHODS[method] | change),
        )
        trainer = ForecastTrainer(config, frame)
        write_forecast_report(trainer, trainer.train())
    pipeline = VSDMForecastPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, json.loads((folder / "metrics.json").read_text())


def with_solver(pipeline: VSDMForecastPipeline, solver: str) -> VSDMForecastPipeline:
    """The same model, sampled in another way."""
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver=solver)
    other = VSDMForecastPipeline(pipeline.model, scheduler, pipeline.normalizer)
    other.set_progress_bar_config(disable=True)
    return other


def forecast(pipeline: VSDMForecastPipeline, windows: list[Any], steps: int) -> dict[str, float]:
    """Scores of a way to sample."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    histories = [history for history, _ in windows]
    started = time.perf_counter()
    output: Any = pipeline(histories, SAMPLES, num_inference_steps=steps, generator=generator)
    seconds = time.perf_counter() - started
    return forecast_metrics(output.samples, [window for _, window in windows]) | {"sampling_seconds": seconds}


def trained(record: dict[str, Any]) -> dict[str, Any]:
    """What a table shows of a training run."""
    return {key: record["metrics"][key] for key in ("seconds", "lambda")}


Job = tuple[str, str, int, Path]  # data set, method, seed and where the data lie


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Every method on every data set."""
    for dataset in arguments.datasets:
        for seed in arguments.seeds:
            for method in arguments.methods:
                yield dataset, method, seed, arguments.data


def validate(job: tuple[Job, dict[str, Any]]) -> dict[str, Any]:
    """Score a choice on the windows before the test's."""
    (dataset, method, seed, data), choice = job
    chosen = DATASETS[dataset]
    frame = series(dataset, data).iloc[: -chosen.horizon * chosen.windows]
    pipeline, record = model(dataset, method, seed, frame, VALIDATION_WINDOWS, **choice)
    windows = rolling_windows(frame, chosen.horizon, VALIDATION_WINDOWS)
    solver, steps = SAMPLERS[method][0]
    scores = trained(record) | forecast(with_solver(pipeline, solver), windows, steps)
    name = ", ".join((f"{dataset}: {method}", *(f"{key} {value}" for key, value in choice.items())))
    return {"name": name, "seed": seed, "metrics": scores, "config": record["config"]}


def validation(arguments: argparse.Namespace) -> None:
    """Score the choices."""
    choices = [(job, choice) for job in jobs(arguments) for choice in CHOICES.get(job[1], ())]
    for run in run_all(validate, choices):
        write("forecast_validation", [run])
        print(run["name"], run["seed"], run["metrics"]["crps_sum"], flush=True)


def evaluate(job: Job) -> dict[str, Any]:
    """Train a method and score it with each of its samplers."""
    dataset, method, seed, data = job
    frame, chosen = series(dataset, data), DATASETS[dataset]
    windows = rolling_windows(frame, chosen.horizon, chosen.windows)
    pipeline, record = model(dataset, method, seed, frame, chosen.windows)
    metrics = trained(record)
    for i, (solver, steps) in enumerate(SAMPLERS[method]):
        scores = forecast(with_solver(pipeline, solver), windows, steps)
        metrics |= {f"{key} {solver}@{steps}": value for key, value in scores.items()}
        if i == 0:
            metrics |= scores
    return {"name": f"{dataset}: {method}", "seed": seed, "metrics": metrics, "config": record["config"]}


def table(arguments: argparse.Namespace) -> None:
    """Train and score every method."""
    for run in run_all(evaluate, jobs(arguments)):
        write("forecast", [run])
        scores = {key: value for key, value in run["metrics"].items() if key.startswith("crps_sum")}
        print(run["name"], run["seed"], scores, flush=True)


def speed(arguments: argparse.Namespace) -> None:
    """100 paths of 24 times and 138 series after one history, in few steps and in 150; scores of the table."""
    dataset = "electricity-138"
    frame, chosen = series(dataset, arguments.data), DATASETS[dataset]
    history, _ = rolling_windows(frame, chosen.horizon, chosen.windows)[-1]
    scored = json.loads((RESULTS / "forecast.json").read_text())["runs"]
    for method in arguments.methods:
        pipeline, record = model(dataset, method, arguments.seeds[0], frame, chosen.windows)
        (scores,) = (
            run["metrics"]
            for run in scored
            if run["name"] == f"{dataset}: {method}" and run["seed"] == arguments.seeds[0]
        )
        for solver, steps in SAMPLERS[method]:
            sampler, runs = with_solver(pipeline, solver), []
            for repeat in range(arguments.repeats):
                started = time.perf_counter()
                sampler(history, SAMPLES, num_inference_steps=steps, generator=torch.Generator().manual_seed(repeat))
                seconds = time.perf_counter() - started
                metrics = {"seconds": seconds, "crps_sum": scores[f"crps_sum {solver}@{steps}"]}
                name = f"{method}, {solver}, {steps} calls"
                runs.append({"name": name, "seed": repeat, "metrics": metrics, "config": record["config"]})
            write("forecast_speed", runs, torch.get_num_threads())
            print(runs[0]["name"], [run["metrics"]["seconds"] for run in runs], flush=True)


def calibrate(job: Job) -> dict[str, Any]:
    """The sum over the series one step ahead, at every row of the test windows: its mean and its spread."""
    dataset, method, seed, data = job
    frame, chosen = series(dataset, data), DATASETS[dataset]
    pipeline, record = model(dataset, method, seed, frame, chosen.windows)
    rows, season = chosen.horizon * chosen.windows, pipeline.model.config["differencing"]
    origins = rolling_windows(frame, 1, rows)
    histories = [history.iloc[-pipeline.model.history_length :] for history, _ in origins]
    solver, steps = SAMPLERS[method][0]
    output: Any = with_solver(pipeline, solver)(
        histories,
        SAMPLES,
        prediction_length=1,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(EVALUATION_SEED),
    )
    sums = output.samples.sum((2, 3))  # (rows, paths)
    truth = np.array([row.to_numpy().sum() for _, row in origins])
    known = np.array([h.to_numpy()[-season].sum() for h, _ in origins]) if season else 0.0
    mean = sums.mean(1)
    error, covariance = np.sqrt(np.square(truth - mean).mean()), np.cov(mean - known, truth - known)
    metrics = {
        "slope": covariance[0, 1] / covariance[0, 0],
        "spread": sums.std(1).mean() / error,
        "error": error / (truth - known).std(),
    }
    return {"name": f"{dataset}: {method}", "seed": seed, "metrics": metrics, "config": record["config"]}


def calibration(arguments: argparse.Namespace) -> None:
    """How well the forecasts of the sum are calibrated."""
    for run in run_all(calibrate, jobs(arguments)):
        write("forecast_calibration", [run])
        print(run["name"], run["seed"], run["metrics"], flush=True)


def card(arguments: argparse.Namespace) -> None:
    """Copy a trained pipeline of exchange to `model_cards/`."""
    frame, target = series("exchange", arguments.data), ROOT / "model_cards" / "exchange"
    _, record = model("exchange", "VSDM", arguments.seeds[0], frame, DATASETS["exchange"].windows)
    shutil.copytree(WORK / f"exchange-vsdm-{arguments.seeds[0]}", target, dirs_exist_ok=True)
    (target / "README.md").unlink()
    os.chdir(ROOT)
    render_card(target.relative_to(ROOT), record)


def write(name: str, runs: list[dict[str, Any]], threads: int = 1) -> None:
    """Into the record, in place of what it had of the same name and seed."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    new = {(run["name"], run["seed"]) for run in runs}
    kept = [run for run in old if (run["name"], run["seed"]) not in new]
    names = [f"{dataset}: {method}" for dataset in DATASETS for method in METHODS]
    place = {run_name: i for i, run_name in enumerate(names)}
    record = {
        "command": f"python -m benchmarks.forecast {name.partition('_')[2] or 'table'} --data DATA",
        "versions": versions(),
        "machine": {"cores": os.cpu_count(), "threads": threads},
        "runs": sorted(kept + runs, key=lambda run: (place.get(run["name"], 0), run["seed"])),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


STUDIES = {"validation": validation, "table": table, "speed": speed, "calibration": calibration, "card": card}


def main() -> None:
    """Run a study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["exchange", "electricity-138", "solar"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="of a timing")
    arguments = parser.parse_args()
    STUDIES[arguments.study](arguments)


if __name__ == "__main__":
    main()
