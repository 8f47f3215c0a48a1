"""Simple forecasts of several series at once, judged as the literature judges (TimeGrad; Table 3 of VSDM).

    python -m benchmarks.forecast_baselines --data DATA                     # all data sets, the classical baselines
    python -m benchmarks.forecast_baselines --data DATA --baselines DeepAR  # wants `pip install lightning`

DATA holds the folder `timeseries`. A forecast of a window is 100 paths given all rows before it, and parameters are
fitted anew for each window (those of DeepAR once, before the first). Settings are those with the least CRPS-sum on
three times as many windows, directly before the test windows. Adds its runs to
`benchmarks/results/forecast_baselines.json`.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusers_vsdm.data.frames import rolling_windows
from diffusers_vsdm.data.series import load_series
from diffusers_vsdm.metrics.forecast import forecast_metrics

from .tables import RESULTS


SAMPLES, SEEDS = 100, (0, 1, 2)
DEEP_AR_SECONDS = 120  # of training, on one core
VALIDATION = 3  # windows for the choice of settings, for each test window
Sampler = Callable[[np.random.Generator], np.ndarray]  # -> (samples, horizon, series)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Series and how they are split; the first of the seasons is the phase of the errors."""

    file: str
    options: dict[str, Any]  # of load_series
    horizon: int
    windows: int
    seasons: tuple[int, ...]
    exponential_smoothing: tuple[dict[str, Any], ...]
    rows: int  # the last ones, for exponential smoothing: it would forget older ones anyway


def seasonal(*periods: int) -> tuple[dict[str, Any], ...]:
    """Models without a trend: over a day it would lead away."""
    return tuple({"trend": None, "seasonal": "add", "seasonal_periods": period} for period in periods)


SIMBENCH = "simbench_2016_15min.npz"
# two stamps are irregular, where the clock changes: the rows count, not the stamps
CONSECUTIVE = {"irregular": "renumber"}
DATASETS = {
    "exchange": Dataset(
        "exchange_rate_nips.tar.gz",
        {},
        30,
        5,
        (5,),
        ({"trend": None}, {"trend": "add"}, {"trend": "add", "damped_trend": True}),
        1000,
    ),
    "electricity": Dataset(
        SIMBENCH, {"columns": ["load"], "resample": "h"} | CONSECUTIVE, 24, 7, (24, 168), seasonal(24, 168), 8 * 168
    ),
    "electricity-138": Dataset(
        SIMBENCH,
        {"columns": ["load", "res"], "resample": "h"} | CONSECUTIVE,
        24,
        7,
        (24, 168),
        seasonal(24, 168),
        8 * 168,
    ),
    # by the hour the week is the better season; here it takes so long that it is not compared again
    "electricity-15min": Dataset(
        SIMBENCH, {"columns": ["load"]} | CONSECUTIVE, 24, 7, (96, 672), seasonal(672), 4 * 672
    ),
    "solar": Dataset("nrel_solar_fl_dayahead.csv.gz", {}, 10, 7, (10,), seasonal(10), 600),
}


def naive(history: np.ndarray, horizon: int) -> Sampler:
    """The last row and a Gaussian random walk from it, with the covariance of the steps."""
    covariance = np.cov(np.diff(history, axis=0).T)

    def draw(rng: np.random.Generator) -> np.ndarray:
        # eigh: a series that is there twice makes the covariance singular
        steps = rng.multivariate_normal(np.zeros(len(covariance)), covariance, (SAMPLES, horizon), method="eigh")
        return history[-1] + steps.cumsum(1)

    return draw


def seasonal_naive(history: np.ndarray, horizon: int, season: int, phase: int, last: int | None) -> Sampler:
    """The last season again, and the errors that this rule made in the past, from the `last` so many forecasts.

    An error is drawn whole, for all series and steps, from the forecasts that began at the same hour.
    """
    again = np.arange(horizon) % season - season
    starts = np.arange(len(history) - horizon, season - 1, -phase)[:last, None]
    errors = history[starts + np.arange(horizon)] - history[starts + again]
    forecast = history[len(history) + again]
    return lambda rng: forecast + errors[rng.integers(len(errors), size=SAMPLES)]


def vector_autoregression(
    history: np.ndarray, horizon: int, phase: int, lag: int, order: int, ridge: float
) -> Sampler:
    """Least squares on differences of `lag` (0: on levels), with the penalty `ridge` on standardized inputs.

    The innovations of a path are residuals of the past: a run of whole rows that began at the same hour.
    """
    x = history[lag:] - history[: len(history) - lag] if lag else history
    inputs = np.concatenate([x[order - i - 1 : len(x) - i - 1] for i in range(order)], axis=1)
    center, scale, mean = inputs.mean(0), inputs.std(0), x[order:].mean(0)
    z = (inputs - center) / scale
    gram = z.T @ z / len(z) + ridge * np.eye(z.shape[1])
    weights = np.linalg.solve(gram, z.T @ (x[order:] - mean) / len(z))
    residuals = x[order:] - mean - z @ weights
    starts = np.arange(len(residuals) - phase * math.ceil(horizon / phase), -1, -phase)

    def draw(rng: np.random.Generator) -> np.ndarray:
        innovations = residuals[rng.choice(starts, SAMPLES)[:, None] + np.arange(horizon)]
        path = np.empty((SAMPLES, lag + order + horizon, history.shape[1]))
        path[:, : lag + order] = history[-lag - order :]
        for step, now in enumerate(range(lag + order, path.shape[1])):
            before = np.stack([path[:, now - i - 1] for i in range(order)], axis=1)
            if lag:
                before -= np.stack([path[:, now - i - 1 - lag] for i in range(order)], axis=1)
            path[:, now] = mean + (before.reshape(SAMPLES, -1) - center) / scale @ weights + innovations[:, step]
            path[:, now] += path[:, now - lag] if lag else 0
        return path[:, lag + order :]

    return draw


def exponential_smoothing(history: np.ndarray, horizon: int, rows: int, **setting: Any) -> Sampler:
    """One model for each series, independent of the others."""
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    fitted = []
    for values in history[-rows:].T:
        # the heuristic leaves a few smoothing parameters to fit, not a season of initial values too
        model = ETSModel(values, error="add", initialization_method="heuristic", **setting)
        fitted.append(model.fit(disp=False))

    def draw(rng: np.random.Generator) -> np.ndarray:
        paths = [model.simulate(horizon, anchor="end", repetitions=SAMPLES, rng=rng) for model in fitted]
        return np.stack(paths, axis=-1).swapaxes(0, 1)

    return draw


def deep_ar(histories: list[np.ndarray], horizon: int, seasons: tuple[int, ...], seconds: float) -> list[Sampler]:
    """GluonTS's DeepAR: one network for every series, independent given it. Trained before the first window, once."""
    import torch
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    def entries(history: np.ndarray, ahead: int) -> ListDataset:
        # the clock is made up, and the network is told the phase instead
        angle = 2 * np.pi * np.arange(len(history) + ahead) / np.array(seasons)[:, None]
        features = np.concatenate([np.sin(angle), np.cos(angle)]).astype(np.float32)
        rows = [
            {"start": "2000-01-01", "target": values, "feat_dynamic_real": features, "feat_static_cat": [i]}
            for i, values in enumerate(history.T.astype(np.float32))
        ]
        return ListDataset(rows, freq="D")

    torch.manual_seed(0)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        estimator = DeepAREstimator(
            freq="D",
            prediction_length=horizon,
            context_length=max(2 * horizon, min(seasons[0], 96)),
            num_feat_dynamic_real=2 * len(seasons),
            num_feat_static_cat=1,
            cardinality=[histories[0].shape[1]],
            lags_seq=sorted({1, 2, 3, *seasons}),
            time_features=[],
            num_parallel_samples=SAMPLES,
            trainer_kwargs={
                "max_epochs": 10_000,
                "max_time": {"seconds": seconds},
                "accelerator": "cpu",
                "default_root_dir": folder,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        )
        predictor = estimator.train(entries(histories[0], 0))

    def sampler(history: np.ndarray) -> Sampler:
        def draw(rng: np.random.Generator) -> np.ndarray:
            torch.manual_seed(int(rng.integers(2**31)))
            return np.stack([forecast.samples for forecast in predictor.predict(entries(history, horizon))], axis=-1)

        return draw

    return [sampler(history) for history in histories]


Fit = Callable[..., Iterable[Sampler]]


def anew(fit: Callable[..., Sampler]) -> Fit:
    """Fitted for each window, and only when its turn comes: fitted models may be large."""
    return lambda histories, horizon, **setting: (fit(history, horizon, **setting) for history in histories)


def product(**choices: Any) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def autoregressions(data: Dataset) -> list[dict[str, Any]]:
    """On levels, and on differences of a row, a day and a week."""
    common = {"phase": data.seasons[:1], "order": (1, 2)}
    # almost none: a series that is there twice makes the least squares singular
    ridge = (1e-6, 0.1)
    # on levels a penalty pulls slow series to their mean, and leaves no innovations but that pull
    return product(lag=(0,), ridge=ridge[:1], **common) + product(lag=(1, *data.seasons), ridge=ridge, **common)


# how to fit, and the settings to choose from
BASELINES: dict[str, tuple[Fit, Callable[[Dataset], list[dict[str, Any]]]]] = {
    "naive": (anew(naive), lambda data: [{}]),
    "seasonal naive": (
        anew(seasonal_naive),
        lambda data: product(season=data.seasons, phase=data.seasons[:1], last=(60, None)),
    ),
    "ETS": (
        anew(exponential_smoothing),
        lambda data: [{"rows": data.rows, **setting} for setting in data.exponential_smoothing],
    ),
    "VAR": (anew(vector_autoregression), autoregressions),
    "DeepAR": (deep_ar, lambda data: [{"seasons": data.seasons, "seconds": DEEP_AR_SECONDS}]),
}


def choose(name: str, data: Dataset, frame: pd.DataFrame) -> tuple[dict[str, Any], dict[str, float]]:
    """The setting with the least CRPS-sum on the windows before the test's, and what all of them had."""
    fit, settings = BASELINES[name]
    if len(settings(data)) == 1:
        return settings(data)[0], {}
    windows = rolling_windows(frame.iloc[: -data.horizon * data.windows], data.horizon, VALIDATION * data.windows)
    found = []
    for setting in settings(data):
        samplers = fit([history.to_numpy() for history, _ in windows], data.horizon, **setting)
        rng = np.random.default_rng(0)
        metrics = forecast_metrics([draw(rng) for draw in samplers], [window for _, window in windows], series=[0])
        found.append((metrics["crps_sum"], setting))
    scores = {json.dumps(setting): score for score, setting in found}
    return min(found, key=lambda entry: entry[0])[1], scores


def measure(name: str, dataset: str, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The runs of one baseline on one data set."""
    data, runs = DATASETS[dataset], []
    start = time.perf_counter()
    setting, validation = choose(name, data, frame)
    chosen = time.perf_counter()
    windows = rolling_windows(frame, data.horizon, data.windows)
    samplers = BASELINES[name][0]([history.to_numpy() for history, _ in windows], data.horizon, **setting)
    rngs = [np.random.default_rng(seed) for seed in SEEDS]
    samples = [[draw(rng) for rng in rngs] for draw in samplers]
    seconds = {"seconds_choosing": round(chosen - start, 2), "seconds": round(time.perf_counter() - chosen, 2)}
    for seed, of_seed in zip(SEEDS, zip(*samples, strict=True), strict=True):
        metrics = forecast_metrics(list(of_seed), [window for _, window in windows]) | seconds
        config = {"setting": setting, "validation": validation}
        runs.append({"name": f"{dataset}: {name}", "seed": seed, "metrics": metrics, "config": config})
    return runs


def write(runs: list[dict[str, Any]]) -> None:
    """Into the record, in place of what it had under the same names."""
    path = RESULTS / "forecast_baselines.json"
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    names = [f"{dataset}: {name}" for dataset in DATASETS for name in BASELINES]
    runs = [run for run in old if run["name"] not in {run["name"] for run in runs}] + runs
    record = {
        "study": "forecast_baselines",
        "command": "python -m benchmarks.forecast_baselines --data DATA",
        "versions": {package: version(package) for package in ("gluonts", "numpy", "pandas", "statsmodels")},
        "configuration": {
            "samples": SAMPLES,
            "data": {
                name: {"horizon": data.horizon, "windows": data.windows, "seasons": data.seasons}
                for name, data in DATASETS.items()
            },
        },
        "runs": sorted(runs, key=lambda run: (names.index(run["name"]), run["seed"])),
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=[n for n in BASELINES if n != "DeepAR"])
    arguments = parser.parse_args()
    for dataset in arguments.datasets:
        data = DATASETS[dataset]
        frame = load_series(str(arguments.data / "timeseries" / data.file), **data.options)
        for name in arguments.baselines:
            runs = measure(name, dataset, frame)
            print(runs[0]["name"], frame.shape, runs[0]["config"]["setting"], runs[0]["metrics"], flush=True)
            write(runs)


if __name__ == "__main__":
    main()
