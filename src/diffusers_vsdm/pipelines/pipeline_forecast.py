"""`VSDMForecastPipeline`: sample paths of many series together, from their history on."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..data.calendar import calendar_features
from ..models.forecaster import ForecastModel
from ..normalizer import DataNormalizer
from ..schedulers import VSDMScheduler
from .pipeline_vsdm import VSDMPipeline, default_num_steps


MOST_PATHS, MOST_VALUES = 4096, 1 << 27  # sampled at once


@dataclass
class VSDMForecastOutput(BaseOutput):
    """Output of [`VSDMForecastPipeline`].

    Args:
        samples (`np.ndarray` of shape `(num_samples, prediction_length, d)`): Sample paths in data units; of several
            histories `(windows, num_samples, prediction_length, d)`.
        index (`pd.PeriodIndex` or `pd.RangeIndex`, or a list of one for each history): Times of the forecast.
        names (`list[str]`): Of the series.
    """

    samples: np.ndarray
    index: Any
    names: list[str]

    @property
    def mean(self) -> np.ndarray:
        """Mean of the paths, `(..., prediction_length, d)`."""
        return self.samples.mean(axis=-3)

    def quantile(self, q: float | list[float]) -> np.ndarray:
        """Quantiles of the paths at levels in [0, 1]: `(..., prediction_length, d)`, after the levels if several."""
        return np.quantile(self.samples, q, axis=-3)

    def to_dataframe(self, q: float | None = None) -> Any:
        """Of a single history: the mean, or a quantile, as a DataFrame of the forecast's times and series."""
        import pandas as pd

        self._check_single("to_dataframe")
        return pd.DataFrame(self.mean if q is None else self.quantile(q), index=self.index, columns=self.names)

    def plot(
        self,
        history: Any = None,
        truth: Any = None,
        series: str | list[str] | list[int] | None = None,
        intervals: tuple[float, ...] = (0.5, 0.9),
        num_history: int | None = None,
        paths: int = 0,
    ) -> Any:
        """The fan of a single history's forecast: a matplotlib figure, a panel for each series.

        Args:
            history, truth (`pd.DataFrame` or array `(time, d)`, *optional*): What came before, and what came.
            series (*optional*): Names or numbers of the series, or a name. Defaults to the first four.
            intervals: Masses of the central intervals that are shaded.
            num_history (`int`, *optional*): Times of the history to show. Defaults to twice the forecast's.
            paths (`int`, defaults to 0): Sample paths to draw too.
        """
        from matplotlib.figure import Figure

        self._check_single("plot")
        several = range(min(4, len(self.names))) if series is None else series
        chosen = [self._number(s) for s in ([several] if isinstance(several, str) else several)]
        figure = Figure(figsize=(8, 2.2 * len(chosen)), dpi=110, layout="constrained")
        length = self.samples.shape[1]
        ahead = np.arange(length)
        shown = num_history or 2 * length
        for panel, i in zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen, strict=True):
            if history is not None:
                past = self._column(history, i)[-shown:]
                panel.plot(np.arange(-len(past), 0), past, color="0.2", lw=1)
            for mass in sorted(intervals, reverse=True):
                low, high = self.quantile([0.5 - mass / 2, 0.5 + mass / 2])[..., i]
                panel.fill_between(ahead, low, high, color="tab:blue", alpha=0.25, lw=0, label=f"{mass:.0%}")
            panel.plot(ahead, self.quantile(0.5)[:, i], color="tab:blue", lw=1.2, label="median")
            for path in self.samples[:paths, :, i]:
                panel.plot(ahead, path, color="tab:blue", lw=0.4, alpha=0.6)
            if truth is not None:
                panel.plot(ahead, self._column(truth, i)[:length], color="tab:orange", lw=1, label="truth")
            panel.set_title(self.names[i], fontsize="small", loc="left")
            panel.margins(x=0)
        figure.axes[0].legend(fontsize="x-small", loc="upper left", ncols=4)
        figure.axes[-1].set_xlabel(f"times from {self.index[0]} on")
        return figure

    def _number(self, series: str | int) -> int:
        if isinstance(series, str):
            if series not in self.names:
                raise ValueError(f"`series` {series!r} is not one of {self.names[:8]}...")
            return self.names.index(series)
        if not -len(self.names) <= series < len(self.names):
            raise ValueError(f"`series` {series} is not one of the {len(self.names)} series, which count from 0.")
        return series

    def _column(self, values: Any, i: int) -> np.ndarray:
        """A series by its name, or of an array by its place; with times, those that are missing are NaN."""
        from ..data.frames import frames_of

        (frame,), _ = frames_of(values, getattr(self.index, "freqstr", None))
        place = list(frame.columns).index(self.names[i]) if self.names[i] in frame.columns else i
        return frame.iloc[:, place].to_numpy()

    def _check_single(self, method: str) -> None:
        if self.samples.ndim != 3:
            raise ValueError(f"`{method}` is for the forecast of one history, this has {len(self.samples)}: take one.")

    def windows(self) -> list["VSDMForecastOutput"]:
        """The forecasts of several histories, each by itself."""
        if self.samples.ndim == 3:
            return [self]
        pairs = zip(self.samples, self.index, strict=True)
        return [VSDMForecastOutput(samples=samples, index=index, names=self.names) for samples, index in pairs]


class VSDMForecastPipeline(DiffusionPipeline):
    """Probabilistic forecasts of d series by a conditional diffusion of their next values, one time after the other.

    Args:
        model ([`ForecastModel`]): The encoder of the past and the denoiser.
        scheduler ([`VSDMScheduler`]): The process, with its drift.
        normalizer ([`DataNormalizer`], *optional*): Maps the scheduler's units to the model's.
    """

    model_cpu_offload_seq = "model"
    _exclude_from_cpu_offload = ["normalizer"]
    _optional_components = ["normalizer"]

    def __init__(self, model: ForecastModel, scheduler: VSDMScheduler, normalizer: DataNormalizer | None = None):
        super().__init__()
        VSDMPipeline._align(model)
        model.eval()  # or else dropout would be part of the forecast
        self.register_modules(model=model, scheduler=scheduler, normalizer=normalizer)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Diffusers; another scheduler is refused, whenever it comes."""
        if name == "scheduler" and not isinstance(value, VSDMScheduler):
            raise ValueError(
                f"`scheduler` must be a VSDMScheduler, got {type(value).__name__}: use"
                " `VSDMScheduler.from_config(scheduler.config)`."
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        history: Any,
        num_samples: int = 100,
        prediction_length: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        start: Any = None,
        batch_size: int | None = None,
        return_dict: bool = True,
    ) -> VSDMForecastOutput | tuple[np.ndarray]:
        """Sample paths of the times after a history.

        Args:
            history: Values up to the first time to predict, `(time, d)` with NaN where missing: a DataFrame with a
                regular index of time, or an array with `start`; a list of these, or a GluonTS data set, for several.
                There must be `model.history_length` times at least, and more are not read.
            num_samples (`int`, defaults to 100): Sample paths of each history.
            prediction_length (`int`, *optional*): Times to predict. Defaults to those that the model was trained for.
            num_inference_steps (`int`, *optional*): Steps of the solver at each time. Defaults to 50, or all training
                times if there are fewer.
            generator (`torch.Generator`, *optional*): For reproducible paths; they depend on `batch_size` too.
            start (`str`, `pd.Period` or `int`, *optional*): The first time of arrays, of all of them; for a model whose
                series have no clock its number, by default 0.
            batch_size (`int`, *optional*): Paths that are sampled at once. Defaults to 4096, or as many as have 1 GiB of
                values to remember.
            return_dict (`bool`, defaults to `True`): Whether to return a [`VSDMForecastOutput`] or a tuple.

        Returns:
            [`VSDMForecastOutput`], or the tuple `(samples,)`.

        Raises:
            ValueError: A history is too short, has another number of series, lacks some of the model's, or has another
                frequency than the model's, an index with doubled times or times out of order, infinite values, or a
                series without any value in the model's reach; or a number is not positive.
            TypeError: A history is of another type.
        """
        length = self.model.config["prediction_length"] if prediction_length is None else prediction_length
        steps = default_num_steps(self.scheduler) if num_inference_steps is None else num_inference_steps
        numbers = {"num_samples": num_samples, "prediction_length": length, "num_inference_steps": steps}
        for name, value in (numbers | ({} if batch_size is None else {"batch_size": batch_size})).items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")
        if isinstance(generator, (list, tuple)):
            raise ValueError(f"`generator` must be one for all paths, got {len(generator)} of them.")
        if self.model.config["encoder_type"] == "transformer" and length > self.model.config["prediction_length"]:
            raise ValueError(
                f"`prediction_length` {length} is more than the {self.model.config['prediction_length']} that this"
                " model's transformer has positions for."
            )
        if batch_size is None:
            remembered = (self.model.units.reach + length) * self.model.config["num_series"]
            batch_size = max(1, min(MOST_PATHS, MOST_VALUES // remembered))
        frames, is_single = self._frames(history, start)
        values = torch.stack([self._values(frame) for frame in frames])
        indices = [_times_after(frame.index, length) for frame in frames]
        reach = self.model.history_length
        calendar = torch.stack(
            [
                calendar_features(frame.index[-reach:].append(index), self.model.config["season_length"])
                for frame, index in zip(frames, indices, strict=True)
            ]
        )
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        per_window = min(num_samples, batch_size)
        num_windows = max(1, batch_size // per_window)
        rows = []
        splits = [min(per_window, num_samples - done) for done in range(0, num_samples, per_window)]
        with self.progress_bar(total=len(splits) * math.ceil(len(frames) / num_windows) * length) as bar:
            for first in range(0, len(frames), num_windows):
                part = slice(first, first + num_windows)
                paths = [self._paths(values[part], calendar[part], n, length, generator, bar) for n in splits]
                rows.append(torch.cat(paths, dim=1))
        samples = torch.cat(rows).numpy()
        self.maybe_free_model_hooks()
        output = VSDMForecastOutput(
            samples=samples[0] if is_single else samples,
            index=indices[0] if is_single else indices,
            names=[str(name) for name in frames[0].columns],
        )
        return output if return_dict else (output.samples,)

    def predictor(
        self, num_inference_steps: int | None = None, seed: int | None = None, batch_size: int | None = None
    ) -> Any:
        """This pipeline as a `gluonts.model.predictor.Predictor`, for `make_evaluation_predictions` and the like.

        Args:
            num_inference_steps, batch_size: As in the call.
            seed (`int`, *optional*): Of the paths; by default they differ from call to call.
        """
        from .gluonts_predictor import VSDMPredictor

        return VSDMPredictor(self, num_inference_steps, seed, batch_size)

    # Sampling -------------------------------------------------------------------------------------------------------

    def _paths(
        self, values: Tensor, calendar: Tensor, num_samples: int, length: int, generator: Any, bar: Any
    ) -> Tensor:
        """Paths `(windows, num_samples, length, d)` of histories `(windows, history_length, d)`, in float64."""
        model, units, device = self.model, self.model.units, self._execution_device
        reach, scale = units.reach, units.scale(values)

        def told(inputs: Tensor) -> Tensor:
            return inputs.to(device, model.dtype)

        past = calendar[:, reach : units.history_length]
        _, state = model.encode(told(units.inputs(values, past, scale, units.locations(values, scale))))
        state = model.encoder.repeat(state, num_samples)
        scale = type(scale)(*(part.repeat_interleave(num_samples, 0) for part in scale))
        # the lags of what is missing are missing; what is a difference to it is one to the last value before
        recent = _with_room(values[:, -reach:], num_samples, length)
        filled = _filled(values, units.differencing)
        references = recent if filled is values else _with_room(filled[:, -reach:], num_samples, length)
        ahead = calendar[:, units.history_length :].repeat_interleave(num_samples, 0)
        for step in range(length):
            # the last of these is the one to predict, whose location is known
            window = slice(step, step + reach + 1)
            location = units.locations(references[:, window], scale)
            inputs = units.inputs(recent[:, window], ahead[:, step : step + 1], scale, location)
            condition, state = model.encode(told(inputs), state)
            x = location[:, 0] + scale.scale[:, 0] * self._sample(condition[:, 0], generator).cpu().double()
            recent[:, reach + step] = references[:, reach + step] = x
            bar.update()
        return recent[:, reach:].unflatten(0, (-1, num_samples))

    def _sample(self, condition: Tensor, generator: Any) -> Tensor:
        """One value of all series in the model's units, `(n, d)`, given what the encoder knows."""
        scheduler, model = self.scheduler, self.model
        scheduler.set_begin_index(0)
        shape = (len(condition), model.config["num_series"])
        latents = scheduler.sample_prior(shape, generator, condition.device, model.dtype)
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, timestep).to(model.dtype)
            output = model(model_input, timestep, condition=condition, return_dict=False)[0]
            latents = scheduler.step(output, timestep, latents, generator=generator, return_dict=False)[0]
        if self.normalizer is None:
            return latents
        return self.normalizer.to(latents.device).denormalize(latents)

    # Input ----------------------------------------------------------------------------------------------------------

    def _frames(self, history: Any, start: Any) -> tuple[list[Any], bool]:
        """Histories as frames whose index is the model's kind, and whether there is only one."""
        import pandas as pd

        from ..data.frames import frames_of, same_step

        freq = self.model.config["freq"]
        history = list(history) if isinstance(history, Iterator) else history
        frames, is_single = frames_of(history, freq)
        for frame, given in zip(frames, [history] if is_single else history, strict=True):
            if isinstance(given, np.ndarray):
                continue
            if start is not None:
                raise ValueError(
                    f"`start` is the first time of arrays, and a {type(given).__name__} has its own: leave it out, or"
                    " pass an array."
                )
            clock = given["start"] if isinstance(given, Mapping) else given.index
            own = getattr(clock, "freqstr", None)
            if freq is not None and not same_step(own, len(given), freq, len(frame)):
                raise ValueError(
                    f"`history` has another frequency than the model's, {freq!r}, which makes {len(frame)} times of"
                    " it. Resample it; or, if so much is missing, give the missing times as rows of NaN."
                )
        return [self._checked(frame, start, freq) for frame in frames], is_single

    def _checked(self, frame: Any, start: Any, freq: str | None) -> Any:
        import pandas as pd

        from ..data.frames import numbered, quiet_periods

        config, needed = self.model.config, self.model.history_length
        if frame.shape[1] != config["num_series"]:
            raise ValueError(f"`history` has {frame.shape[1]} series, the model was trained on {config['num_series']}.")
        names = config["series_names"]
        columns = [str(name) for name in frame.columns]
        if names is not None and columns == numbered("series", len(columns)):
            frame = frame.set_axis(names, axis=1)  # an array's
        elif names is not None and sorted(columns) == sorted(names):
            frame = frame.set_axis(columns, axis=1)[names]  # in whatever order they came
        elif names is not None and set(columns) & set(names):
            lacking = [name for name in names if name not in columns]
            raise ValueError(f"`history` has some of the model's series, and not {lacking[:5]}: rename or add them.")
        has_clock = isinstance(frame.index, pd.PeriodIndex)
        if freq is not None and not has_clock:
            if start is None:
                raise ValueError(
                    f"`history` has no times, and the model's series have a clock of frequency {freq!r}: pass a"
                    " DataFrame with an index of time, or `start`, the first time of an array."
                )
            with quiet_periods():
                frame = frame.set_axis(pd.period_range(start, periods=len(frame), freq=freq), axis=0)
        if freq is None and start is not None:
            if isinstance(start, bool) or not isinstance(start, (int, np.integer)):
                raise ValueError(f"`start` must be a whole number, for a model without a clock, got {start!r}.")
            frame = frame.set_axis(pd.RangeIndex(int(start), int(start) + len(frame)), axis=0)
        if freq is None and has_clock:
            raise ValueError("`history` has times, but the model was trained on series without a clock: pass an array.")
        if len(frame) < needed:
            raise ValueError(
                f"`history` has {len(frame)} times, and the model needs {needed}: a context of"
                f" {config['context_length']}, and {needed - config['context_length']} before it for its lags."
            )
        recent = frame.iloc[-needed:]
        empty = [str(name) for name in recent.columns[recent.isna().all().to_numpy()]]
        if empty:
            raise ValueError(f"`history` knows nothing of the series {empty[:5]} in its last {needed} times.")
        return frame

    def _values(self, frame: Any) -> Tensor:
        """The values that a forecast depends on, `(history_length, d)`."""
        return torch.from_numpy(frame.to_numpy(np.float64)[-self.model.history_length :].copy())


def _times_after(index: Any, length: int) -> Any:
    """The next times of an index of periods, or of numbers."""
    import pandas as pd

    from ..data.frames import quiet_periods

    if isinstance(index, pd.PeriodIndex):
        with quiet_periods():
            return pd.period_range(index[-1] + 1, periods=length, freq=index.freq)
    return pd.RangeIndex(index[-1] + index.step, index[-1] + index.step * (length + 1), index.step)


def _with_room(values: Tensor, num_samples: int, length: int) -> Tensor:
    """Each window so many times, with `length` unknown times after its own."""
    room = values.new_full((len(values) * num_samples, values.shape[1] + length, values.shape[2]), torch.nan)
    room[:, : values.shape[1]] = values.repeat_interleave(num_samples, 0)
    return room


def _filled(values: Tensor, stride: int) -> Tensor:
    """Each missing value as the last known one a multiple of `stride` times before, `(batch, length, d)`.

    What has none before is filled from behind in the same way, so that some value stands wherever one is known at
    that phase, and else with the series' mean.
    """
    if not stride or not values.isnan().any():
        return values
    filled = values.clone()
    for i in range(stride, filled.shape[1]):
        filled[:, i] = torch.where(filled[:, i].isnan(), filled[:, i - stride], filled[:, i])
    for i in reversed(range(filled.shape[1] - stride)):
        filled[:, i] = torch.where(filled[:, i].isnan(), filled[:, i + stride], filled[:, i])
    return torch.where(filled.isnan(), values.nanmean(1, keepdim=True), filled)
