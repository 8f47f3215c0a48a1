"""The trainer of forecasters: Algorithm 1 on the next values of series, given windows of their past.

The drift carries the values of all windows to the prior, whatever their past: a stage of stochastic approximation
simulates from one of the training windows for each trajectory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.calendar import calendar_features, default_lags, season_of, times_per_week
from ..metrics.forecast import forecast_metrics
from ..models.denoisers import DENOISERS
from ..models.encoders import ENCODERS
from ..models.forecaster import ForecastModel
from ..models.series_units import SCALINGS, SeriesUnits
from ..pipelines import VSDMForecastPipeline
from ..schedulers import VSDMScheduler
from ..solvers import SOLVERS
from .algorithm import BaseTrainer, TrainingResult
from .config import RunConfig, setting


MOMENT_WINDOWS = 2000  # whose values the moments and scales are of
MOMENT_VALUES = 1 << 23  # of them at once
MODEL_SETTINGS = (
    *("encoder_type", "encoder_layers", "encoder_width", "encoder_dropout", "input_dropout"),
    *("denoiser_type", "denoiser_layers", "denoiser_channels", "denoiser_width"),
)
EVALUATION_STEPS, EVALUATION_SEED = 20, 2024


@dataclass
class ForecastConfig(RunConfig):
    """Settings of a run on series."""

    script: ClassVar[str] = "training/train_forecaster.py"
    positive: ClassVar[str] = (
        f"{RunConfig.positive} prediction_length num_eval_samples encoder_layers encoder_width denoiser_layers"
        " denoiser_channels denoiser_width"
    )

    dataset_name: str = setting(
        "", "A data set of GluonTS, or one of series on the Hub, as autogluon/chronos_datasets."
    )
    dataset_config_name: str = setting("", "Configuration of the data set on the Hub.")
    train_data_dir: str = setting("", "A csv, parquet or npz file, or a folder in the layout of either, instead.")
    cache_dir: str = setting("", "Folder for downloaded data sets, instead of the library's own.")
    split: str = setting("train", "Split of the data set on the Hub.")
    time_column: str = setting("", "Column, or array, of the times; by default the first column if it holds dates.")
    columns: list[str] = field(default_factory=list, metadata={"help": "Series, or arrays, to use; by default all."})
    freq: str = setting("", "Frequency as in pandas, h or 15min or B; by default that of the times.")
    irregular: str = setting("error", "What to do with times out of order.", ("error", "renumber"))
    resample: str = setting("", "A coarser frequency, whose means are the series.")
    prediction_length: int = setting(24, "Times to predict.")
    context_length: int = setting(0, "Times that the encoder reads before; 0 for as many.")
    num_test_windows: int = setting(5, "Windows at the end that are kept for the evaluation.")
    num_validation_windows: int = setting(0, "Windows before those, for the evaluation while training.")
    num_eval_samples: int = setting(100, "Sample paths of each window in an evaluation.")

    # model
    lags: list[int] = field(
        default_factory=list,
        metadata={"help": "Times back at which values are read; by default 1 to 3, a season, and a week of hours."},
    )
    season_length: int = setting(0, "Times in a season; 0 for that of the frequency.")
    differencing: int = setting(0, "Model differences to the values so many times before; 0 for the values.")
    scaling: str = setting("mean", "Scale of each series in a window.", SCALINGS)
    encoder_type: str = setting("lstm", "Encoder of the past.", ENCODERS)
    encoder_layers: int = setting(2, "Its layers.")
    encoder_width: int = setting(64, "Its width.")
    encoder_dropout: float = setting(0.1, "Its dropout.")
    input_dropout: float = setting(0.0, "Dropout of what it reads.")
    denoiser_type: str = setting("wavenet", "Network over the series.", DENOISERS)
    denoiser_layers: int = setting(8, "Its layers.")
    denoiser_channels: int = setting(8, "Its channels.")
    denoiser_width: int = setting(64, "Width of its embedding of time.")

    standardize: bool = setting(True, "Train on values of mean 0 and standard deviation 1 in each series.")
    max_train_steps: int = setting(4000, "Gradient steps.")
    # a network of so few steps has no score at first, and lambda would run away
    sa_start: float = setting(0.3, "Share of the steps before lambda is frozen that come before the first stage.")
    train_batch_size: int = setting(64, "Windows in a batch, per process.")
    learning_rate: float = setting(1e-3, "Peak learning rate of AdamW.")
    solver: str = setting("trig", "Solver that the saved pipeline samples with.", SOLVERS)

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            ValueError: A setting is out of its range; the message names it, its value and the range.
        """
        super().__post_init__()
        if not self.dataset_name and not self.train_data_dir:
            raise ValueError("The data are missing: give `dataset_name` or `train_data_dir`.")
        not_negative = "context_length season_length differencing num_test_windows num_validation_windows"
        for name in not_negative.split():
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if any(lag < 1 for lag in self.lags):
            raise ValueError(f"`lags` must be positive, got {self.lags}.")
        if self.validation_steps and not self.num_validation_windows:
            raise ValueError("`validation_steps` needs windows to look at: give `num_validation_windows`.")
        if self.basis == "dct" or self.lambda_per == "channel":
            raise ValueError("`basis` 'dct' and `lambda_per` 'channel' are for images, not for series.")
        for name in ("encoder_dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")


class WindowDataset(Dataset):
    """All windows of series, in the units of a model and read a batch at a time.

    Args:
        values: `(time, d)` in float64, NaN where missing.
        calendar: `(time, features)`.
        units: Of the model.
        prediction_length: Times that a window has after its history.

    Raises:
        ValueError: There is not one window, or nothing is known of a series.
    """

    def __init__(self, values: Tensor, calendar: Tensor, units: SeriesUnits, prediction_length: int):
        length = units.history_length + prediction_length
        if len(values) < length:
            raise ValueError(
                f"The series have {len(values)} times to train on, and a window takes {length}, for lags, context and"
                " prediction: lower `context_length`, `prediction_length` or `lags`, or hold out fewer windows."
            )
        empty = values.isnan().all(0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Nothing is known of the series {empty[:5]} in the times to train on: leave them out.")
        self.values, self.calendar, self.units, self.length = values, calendar, units, length
        self.event_shape = (values.shape[1],)

    def __len__(self) -> int:
        return len(self.values) - self.length + 1

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs `(n, length, features)` and z `(n, length, d)`: see [`SeriesUnits.windows`]."""
        return self.units.windows(*self.raw(indices))

    def raw(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Values and calendar of windows."""
        rows = torch.as_tensor(indices)[:, None] + torch.arange(self.length)
        return self.values[rows], self.calendar[rows]


class ForecastTrainer(BaseTrainer):
    """One run of Algorithm 1 on series.

    Args:
        config ([`ForecastConfig`]): The settings.
        data (`pd.DataFrame`, *optional*): Series `(time, d)` instead of those that the settings name; see
            [`data.frames.regular_frame`].

    Attributes:
        test_windows, validation_windows: Pairs of a history and what came after, which were not trained on.
    """

    config: ForecastConfig

    def _load(self, data: Any) -> WindowDataset:
        from ..data.frames import quiet_periods, regular_frame, rolling_windows

        config, length = self.config, self.config.prediction_length
        frame = load_frame(config) if data is None else regular_frame(data, config.freq or None, config.irregular)
        self.test_windows, self.validation_windows = [], []
        if config.num_test_windows:
            self.test_windows = rolling_windows(frame, length, config.num_test_windows)
            frame = self.test_windows[0][0]
        if config.num_validation_windows:
            self.validation_windows = rolling_windows(frame, length, config.num_validation_windows)
            frame = self.validation_windows[0][0]
        with quiet_periods():
            freq = getattr(frame.index, "freqstr", None)
        season = config.season_length or season_of(freq)
        values = torch.from_numpy(frame.to_numpy(np.float64).copy())
        if config.basis != "identity" and values.isnan().any():
            raise ValueError(
                f"`basis` {config.basis!r} mixes series, and cannot do with missing values: use 'identity'."
            )
        calendar = calendar_features(frame.index, season)
        self.forecaster = ForecastModel(
            num_series=values.shape[1],
            prediction_length=length,
            context_length=config.context_length or length,
            num_train_timesteps=config.ddpm_num_steps,
            lags=config.lags or default_lags(season, times_per_week(freq)),
            num_time_features=calendar.shape[1],
            differencing=config.differencing,
            scaling=config.scaling,
            missing_indicators=bool(values.isnan().any()),
            freq=freq,
            season_length=season,
            series_names=[str(name) for name in frame.columns],
            **{name: getattr(config, name) for name in MODEL_SETTINGS},
        )
        dataset = WindowDataset(values, calendar, self.forecaster.units, length)
        self.forecaster.typical_scale.copy_(self._typical_scale(dataset))
        dataset.units = self.forecaster.units
        if config.standardize:
            self._check_varies(frame)
        return dataset

    def _check_varies(self, frame: Any) -> None:
        """That each series has a standard deviation."""
        m = self.config.differencing
        values = frame.diff(m) if m else frame
        still = [str(name) for name in values.columns[(values.min() == values.max()).to_numpy()]]
        if still:
            what = f"differences over {m} times" if m else "values"
            raise ValueError(
                f"The {what} of the series {still[:5]} never vary in the times to train on: leave them out, or pass"
                " --no_standardize."
            )

    def _some_windows(self, dataset: WindowDataset, number: int, *key: int) -> list[int]:
        """Windows drawn with repetition; the same ones in all processes."""
        entropy = np.random.SeedSequence([self.config.seed, *key]).generate_state(1)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        return torch.randint(len(dataset), (number,), generator=generator).tolist()

    def _typical_scale(self, dataset: WindowDataset) -> Tensor:
        """Of each series the mean over windows in which it varies; 1 for one that never does."""
        units = dataset.units
        scaling = "mean" if units.scaling == "none" else units.scaling
        units = replace(units, scaling=scaling, typical_scale=torch.zeros_like(units.typical_scale))
        scale = torch.cat([units.scale(values).scale[:, 0] for values in self._moment_windows(dataset)])
        mean = torch.where(scale > 0, scale, torch.nan).nanmean(0)
        return mean.nan_to_num(1.0)

    def _moment_windows(self, dataset: WindowDataset) -> Iterator[Tensor]:
        """Values of the windows that moments and scales are of, as many at once as fit."""
        chosen = self._some_windows(dataset, min(len(dataset), MOMENT_WINDOWS), 1)
        size = max(1, MOMENT_VALUES // (dataset.length * dataset.values.shape[1]))
        for first in range(0, len(chosen), size):
            yield dataset.raw(chosen[first : first + size])[0]

    def _moment_batches(self) -> Iterable[Tensor]:
        """Values of windows in the model's units; what is missing is drawn from what is known of its series."""
        generator, batches = torch.Generator().manual_seed(self.config.seed), []
        for values in self._moment_windows(self.dataset):
            z = self.dataset.units.modelled(values).flatten(0, 1)
            for i in z.isnan().any(0).nonzero().flatten().tolist():
                missing = z[:, i].isnan()
                known = z[~missing, i]
                if len(known) == 0:
                    known = torch.zeros(1)
                z[missing, i] = known[torch.randint(len(known), (int(missing.sum()),), generator=generator)]
            batches.append(z)
        return batches

    def _build_network(self) -> ForecastModel:
        return self.forecaster

    def _pipeline(self, network: Any, scheduler: VSDMScheduler) -> VSDMForecastPipeline:
        return VSDMForecastPipeline(network, scheduler, self.normalizer)

    def _num_examples(self, batch: Any) -> int:
        inputs, _ = batch
        return inputs.shape[0] * inputs.shape[1]

    def _examples(self, batch: Any, uniform: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """All times of windows, of context and prediction alike."""
        inputs, z = batch
        z = z.flatten(0, 1)
        missing = z.isnan()
        if not missing.any():
            return z, {"inputs": inputs}, None
        mean = torch.zeros(()) if self.normalizer is None else self.normalizer.mean
        return torch.where(missing, mean.to(z), z), {"inputs": inputs}, 1 - missing.to(z.dtype)

    def _stage_examples(self, network: Any, number: int) -> Tensor:
        """What the encoder knows at some time of a training window, for each trajectory."""
        trajectories = torch.arange(self.config.sa_trajectories)
        inputs, _ = self.dataset.__getitems__(self._some_windows(self.dataset, len(trajectories), 2, number))
        with torch.no_grad():
            condition, _ = network.encode(inputs.to(self.accelerator.device))
        return condition[trajectories, trajectories % condition.shape[1]]

    def _stage_condition(self, network: Any, x: Tensor, condition: Any) -> dict[str, Tensor]:
        return {"condition": condition}

    def _validate(self) -> None:
        """Scores and a picture of the first validation window, in the log and in a file."""
        with self._averaged_network() as network:
            if self.accelerator.is_main_process:
                scheduler = VSDMScheduler.from_config(self.scheduler.config)  # the drift comes along, copied
                pipeline = self._pipeline(network, scheduler)
                found, figure = evaluate_forecasts(pipeline, self.validation_windows, self.config)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.accelerator.log({f"validation/{key}": value for key, value in found.items()}, step=self.step)
            file = self.folder / "validation" / f"step-{self.step}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=2) + "\n")
            if figure is not None:
                figure.savefig(file.with_suffix(".png"))


def load_frame(config: ForecastConfig) -> Any:
    """The series that the settings name."""
    from ..data.series import load_series

    return load_series(
        config.train_data_dir or config.dataset_name,
        config_name=config.dataset_config_name or None,
        split=config.split,
        cache_dir=config.cache_dir or None,
        time_column=config.time_column or None,
        columns=config.columns or None,
        freq=config.freq or None,
        irregular=config.irregular,
        resample=config.resample or None,
    )


def evaluate_forecasts(
    pipeline: VSDMForecastPipeline, windows: list[tuple[Any, Any]], config: ForecastConfig
) -> tuple[dict[str, float], Any]:
    """Scores, see [`forecast_metrics`], and a figure of the first window that can be forecast, if any.

    Windows with missing values, and those before which nothing is known of a series, have no score; `num_windows` is
    how many have one.
    """
    needed = pipeline.model.history_length
    windows = [(history, truth) for history, truth in windows if not history.iloc[-needed:].isna().all().any()]
    if not windows:
        return {"num_windows": 0}, None
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(pipeline.device).manual_seed(EVALUATION_SEED)
    steps = config.ddpm_num_inference_steps or min(EVALUATION_STEPS, config.ddpm_num_steps)
    histories = [history for history, _ in windows]
    output: Any = pipeline(histories, config.num_eval_samples, num_inference_steps=steps, generator=generator)
    whole = [i for i, (_, window) in enumerate(windows) if not window.isna().any(axis=None)]
    scores: dict[str, float] = {"num_windows": len(whole)}
    if whole:
        scores |= forecast_metrics([output.samples[i] for i in whole], [windows[i][1] for i in whole])
    return scores, output.windows()[0].plot(*windows[0])


def train_forecaster(config: ForecastConfig, data: Any = None) -> tuple[TrainingResult, ForecastTrainer]:
    """Train a forecaster as `config` says, on a frame if given; also returns the trainer, for its windows."""
    trainer = ForecastTrainer(config, data)
    return trainer.train(), trainer
