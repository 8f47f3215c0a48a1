"""`VSDMForecastPipeline` without training: inputs, outputs, loading."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_vsdm import DataNormalizer, VSDMForecastPipeline, VSDMScheduler
from diffusers_vsdm.data.calendar import calendar_features
from diffusers_vsdm.data.frames import quiet_periods, regular_frame
from diffusers_vsdm.models.denoisers import DENOISERS
from diffusers_vsdm.models.encoders import ENCODERS
from diffusers_vsdm.models.series_units import SCALINGS
from diffusers_vsdm.pipelines import pipeline_forecast
from diffusers_vsdm.pipelines.pipeline_forecast import VSDMForecastOutput, _filled

from .forecasting import (
    AHEAD,
    MEAN,
    PHI,
    Exact,
    clocked,
    closed_form,
    exact,
    frame,
    generator,
    model,
    quick,
    series,
    small,
)


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


# the pipeline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_type", ENCODERS)
@pytest.mark.parametrize("denoiser_type", DENOISERS)
def test_shapes_of_whatever_stands_for_histories(encoder_type, denoiser_type):
    pipe = small(encoder_type=encoder_type, denoiser_type=denoiser_type)
    one = quick(pipe, series(20))
    assert one.samples.shape == (3, AHEAD, 2) and np.isfinite(one.samples).all()
    assert one.index.equals(pd.RangeIndex(20, 24)) and one.names == ["series_0", "series_1"]
    assert one.windows() == [one]
    several = quick(pipe, [series(20), series(15, seed=1)])
    assert several.samples.shape == (2, 3, AHEAD, 2)
    assert [index[0] for index in several.index] == [20, 15]
    assert quick(pipe, np.stack([series(20)] * 3)).samples.shape == (3, 3, AHEAD, 2)
    assert quick(pipe, [series(20)]).samples.shape == (1, 3, AHEAD, 2)
    (alone,) = quick(pipe, series(20), return_dict=False)
    assert np.array_equal(alone, one.samples)
    second = several.windows()[1]
    assert second.samples.shape == (3, AHEAD, 2) and second.index[0] == 15


def test_seeds():
    pipe = small()
    first, again, other = (quick(pipe, series(20), seed=seed).samples for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.isclose(first, other).any()
    torch.manual_seed(3)
    free = [pipe(series(20), 2, num_inference_steps=4).samples for _ in range(2)]
    assert not np.isclose(*free).any()
    assert len(np.unique(first[:, 0, 0])) == 3  # paths differ


def test_columns_come_in_any_order():
    pipe = clocked(series_names=["a", "b"])
    history = frame()
    expected, swapped = quick(pipe, history), quick(pipe, history[["b", "a"]])
    assert np.array_equal(swapped.samples, expected.samples) and swapped.names == ["a", "b"]
    mixed = quick(pipe, [history[["b", "a"]], history])
    assert mixed.names == ["a", "b"]
    assert np.array_equal(mixed.samples, quick(pipe, [history, history]).samples)


def test_a_picture_shows_the_right_column_of_a_history_in_another_order():
    pipe = clocked(series_names=["a", "b"])
    history = frame()
    drawn = []
    for order in (["a", "b"], ["b", "a"]):
        figure = quick(pipe, history[order]).plot(history[order], history[order].iloc[-4:])
        drawn.append([line.get_ydata().tolist() for axes in figure.axes for line in axes.lines])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "freq, last, expected",
    [
        ("B", "2024-01-04", ["2024-01-05", "2024-01-08", "2024-01-09", "2024-01-10"]),  # over a week's end
        ("h", "2024-01-31 22:00", ["2024-01-31 23:00", "2024-02-01 00:00", "2024-02-01 01:00", "2024-02-01 02:00"]),
        (
            "15min",
            "2024-01-01 10:30",
            ["2024-01-01 10:45", "2024-01-01 11:00", "2024-01-01 11:15", "2024-01-01 11:30"],
        ),
        ("M", "2023-11-30", ["2023-12", "2024-01", "2024-02", "2024-03"]),
    ],
)
def test_times_go_on(freq, last, expected):
    pipe = clocked(freq)
    stamps = pd.date_range(end=last, periods=20, freq={"M": "ME"}.get(freq, freq))
    history = pd.DataFrame(series(20), stamps, ["a", "b"])
    output = quick(pipe, history)
    assert output.index.astype(str).tolist() == expected and isinstance(output.index, pd.PeriodIndex)
    regular = quick(pipe, regular_frame(history, freq))
    assert np.array_equal(regular.samples, output.samples) and regular.index.equals(output.index)
    array = quick(pipe, series(20), start=str(stamps[0]))
    assert np.array_equal(array.samples, output.samples) and array.index.equals(output.index)


def test_the_clock_matters():
    pipe = clocked("D")
    found = [quick(pipe, series(20), start=start).samples for start in ("2024-01-01", "2024-01-02", "2024-01-01")]
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])


def test_columns_that_are_not_the_models_are_refused():
    pipe = clocked(series_names=["a", "b"])
    with pytest.raises(ValueError, match=r"not \['a'\]"):
        quick(pipe, frame(names=("b", "A")))
    assert quick(pipe, frame(names=("x", "y"))).names == ["x", "y"]  # others, in their order


def test_an_array_starts_at_its_number():
    pipe = small(season_length=7)
    numbered = quick(pipe, pd.DataFrame(series(20), pd.RangeIndex(3, 23)))
    array = quick(pipe, series(20), start=3)
    assert np.array_equal(array.samples, numbered.samples) and array.index.equals(numbered.index)
    assert not np.array_equal(array.samples, quick(pipe, series(20)).samples)
    with pytest.raises(ValueError, match="`start`.*whole number"):
        quick(pipe, series(20), start="2024-01-01")


@pytest.mark.parametrize("step", [2, 7])
def test_the_season_counts_rows(step):
    rows = calendar_features(pd.RangeIndex(0, 12), 4)
    assert torch.equal(calendar_features(pd.RangeIndex(0, 12 * step, step), 4), rows)


FREQUENCIES = [("15min", "30min", 20), ("D", "2D", 20), ("D", "W-SUN", 20), ("D", "B", 30), ("h", "30min", 40)]


@pytest.mark.parametrize(
    "kind, model_freq, own, rows",
    [(kind, *case) for kind in ("index", "entry") for case in FREQUENCIES]
    + [("stamps", *case) for case in FREQUENCIES[:3]],  # business days may be days with gaps
)
def test_another_frequency_is_refused(kind, model_freq, own, rows):
    """Whether the index knows its own, or has to be told, or is an entry's."""
    index = pd.date_range("2024-01-01", periods=rows, freq=own)
    history = pd.DataFrame(series(rows), index, ["a", "b"])
    if kind == "stamps":
        history.index.freq = None
    if kind == "entry":
        with quiet_periods():
            history = {"target": series(rows).T, "start": pd.Period("2024-01-01", own)}
    with pytest.raises(ValueError, match="frequency|grid|same step"):
        quick(clocked(model_freq), history)


def test_weeks_may_end_on_any_day():
    stamps = pd.date_range("2024-01-01", periods=20, freq="W-MON")
    assert quick(clocked("W-SUN"), pd.DataFrame(series(20), stamps, ["a", "b"])).samples.shape == (3, AHEAD, 2)


def test_half_precision_keeps_the_scales(tmp_path):
    """float16 knows nothing above 65,504."""
    pipe = clocked()
    pipe.model.typical_scale.copy_(torch.tensor([1e6, 1e-8]))
    pipe.save_pretrained(tmp_path)
    loaded = VSDMForecastPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    for half in (loaded, pipe.to(torch.float16)):
        assert torch.equal(half.model.typical_scale, torch.tensor([1e6, 1e-8])) and half.model.dtype == torch.float16
        history = frame()
        history["a"] *= 1e6
        assert np.isfinite(quick(half, history).samples).all()


def test_many_values_are_sampled_in_parts(monkeypatch):
    pipe, sizes, sample = small(), [], VSDMForecastPipeline._sample
    monkeypatch.setattr(VSDMForecastPipeline, "_sample", lambda *given: sizes.append(len(given[1])) or sample(*given))
    monkeypatch.setattr(pipeline_forecast, "MOST_VALUES", 5 * 2 * (pipe.model.units.reach + AHEAD))
    assert quick(pipe, series(20), num_samples=7).samples.shape == (7, AHEAD, 2)
    assert sizes == [5] * AHEAD + [2] * AHEAD


def test_a_picture_of_one_series_and_of_gaps():
    pipe = clocked("D", series_names=["a", "b"])
    history = frame(20, "D").drop(index=pd.Period("2024-01-20", "D"))
    (axes,) = quick(pipe, history).plot(history, series="b").axes
    past = axes.lines[0].get_ydata()
    assert len(past) == 8 and np.isnan(past).tolist() == [False] * 5 + [True] + [False] * 2
    single = VSDMForecastOutput(samples=np.zeros((2, AHEAD, 1)), index=pd.RangeIndex(20, 24), names=["a"])
    assert len(single.plot(pd.Series(np.arange(20.0))).axes) == 1


def test_a_list_of_generators_is_refused():
    with pytest.raises(ValueError, match="`generator`.*2"):
        small()(series(20), 2, generator=[generator(0), generator(1)])


@pytest.mark.parametrize("width", [8, 40, 56, 100])
def test_transformers_of_any_width(width):
    encoder = ENCODERS["transformer"](3, width, 1, 0.0, 5)
    assert encoder(torch.randn(2, 5, 3))[0].shape == (2, 5, width)


def test_a_unet_says_which_channels_it_takes():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        model(denoiser_type="unet", denoiser_channels=6)


def test_numbers_go_on():
    pipe = small(season_length=7)
    history = pd.DataFrame(series(20), pd.RangeIndex(100, 120))
    output = quick(pipe, history)
    assert output.index.equals(pd.RangeIndex(120, 124))
    other = quick(pipe, history.set_axis(pd.RangeIndex(101, 121)))
    later = quick(pipe, history.set_axis(pd.RangeIndex(107, 127)))
    assert not np.array_equal(other.samples, output.samples) and np.array_equal(later.samples, output.samples)


def test_numbers_go_on_in_their_steps():
    output = quick(small(), pd.DataFrame(series(20), pd.RangeIndex(0, 100, 5)))
    assert output.index.tolist() == [100, 105, 110, 115]


@pytest.mark.parametrize("length", [1, 3, 9])
def test_other_lengths(length):
    pipe = small()
    output = quick(pipe, series(20), prediction_length=length)
    assert output.samples.shape == (3, length, 2) and len(output.index) == length
    whole = quick(exact(sigma=[0.0, 0.0]), series(20)).samples
    part = quick(exact(sigma=[0.0, 0.0]), series(20), prediction_length=length).samples
    both = min(length, AHEAD)
    np.testing.assert_allclose(part[:, :both], whole[:, :both], rtol=1e-3)


def test_a_transformer_has_no_more_positions():
    pipe = small(encoder_type="transformer")
    assert quick(pipe, series(20), prediction_length=2).samples.shape == (3, 2, 2)
    with pytest.raises(ValueError, match="`prediction_length` 5.*4"):
        quick(pipe, series(20), prediction_length=5)


@pytest.mark.parametrize("loader", [VSDMForecastPipeline, DiffusionPipeline])
@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_forecasts_are_bit_identical_after_loading(tmp_path, loader, encoder_type):
    normalizer = DataNormalizer.from_data(torch.randn(50, 2) * 3 + 1)
    pipe = clocked(encoder_type=encoder_type, differencing=1, process=normalizer, series_names=["a", "b"], lags=[2, 1])
    pipe.model.typical_scale.copy_(torch.tensor([0.3, 20.0]))
    before = quick(pipe, frame()).samples
    pipe.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is VSDMForecastPipeline and not loaded.model.training
    assert np.array_equal(quick(loaded, frame()).samples, before)
    assert loaded.model.history_length == pipe.model.history_length
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["model"] == ["diffusers_vsdm", "ForecastModel"]
    assert index["scheduler"] == ["diffusers_vsdm", "VSDMScheduler"]


def test_another_solver_is_swapped_in():
    """And is worth the same: one value does not carry its steps over to the next."""
    pipe = exact(solver="ddim")
    pipe.scheduler = VSDMScheduler.from_config(pipe.scheduler.config, solver="dpmsolver++")
    pipe.model.denoiser = Exact(pipe.scheduler, MEAN, PHI, [1e-3, 1e-3])
    history = series(20)
    samples = pipe(history, 50, num_inference_steps=30, generator=generator()).samples
    mean, _ = closed_form(pipe, history)
    assert pipe.scheduler.config.solver == "dpmsolver++"
    np.testing.assert_allclose(samples.mean(0), mean, rtol=1e-2)


def test_a_stock_scheduler_is_refused():
    with pytest.raises(ValueError, match="`scheduler`.*DDIMScheduler"):
        VSDMForecastPipeline(model(), DDIMScheduler())


@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_a_model_in_training_mode_forecasts_as_in_evaluation(encoder_type):
    """As new modules are, and those that come out of a loop."""
    pipe = small(encoder_type=encoder_type, encoder_dropout=0.5, input_dropout=0.5)
    expected = quick(pipe, series(20)).samples
    pipe.model.train()
    again = VSDMForecastPipeline(pipe.model, pipe.scheduler)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(quick(again, series(20)).samples, expected)


def test_half_precision_forecasts():
    pipe = small()
    expected = quick(pipe, series(20, level=300)).samples
    half = quick(pipe.to(torch.bfloat16), series(20, level=300)).samples
    assert half.dtype == np.float64 and np.isfinite(half).all()
    np.testing.assert_allclose(half.mean(0), expected.mean(0), atol=100)


def test_a_copy_of_a_pipeline_forecasts_the_same():
    pipe = small()
    clone = VSDMForecastPipeline(copy.deepcopy(pipe.model), copy.deepcopy(pipe.scheduler))
    clone.set_progress_bar_config(disable=True)
    assert np.array_equal(quick(clone, series(20)).samples, quick(pipe, series(20)).samples)


# the output ---------------------------------------------------------------------------------------------------------


def test_what_an_output_tells():
    output = quick(clocked(), frame(), num_samples=40)
    samples = output.samples
    assert output.mean.shape == (AHEAD, 2)
    np.testing.assert_allclose(output.mean, samples.mean(0))
    np.testing.assert_allclose(output.quantile(0.25), np.quantile(samples, 0.25, axis=0))
    assert output.quantile([0.1, 0.9]).shape == (2, AHEAD, 2)
    for q, expected in ((None, output.mean), (0.9, output.quantile(0.9))):
        told = output.to_dataframe(q)
        assert told.columns.tolist() == ["a", "b"] and told.index.equals(output.index)
        np.testing.assert_array_equal(told.to_numpy(), expected)
    several = quick(clocked(), [frame(), frame(seed=1)])
    assert several.mean.shape == (2, AHEAD, 2) and several.quantile([0.1, 0.5, 0.9]).shape == (3, 2, AHEAD, 2)
    for call in (several.plot, several.to_dataframe):
        with pytest.raises(ValueError, match="one history"):
            call()
    assert several.windows()[1].to_dataframe().index.equals(several.index[1])


def test_pictures():
    history = frame()
    output = quick(clocked(), history.iloc[:-AHEAD], num_samples=9)
    figure = output.plot(history.iloc[:-AHEAD], history.iloc[-AHEAD:], series=["b"], num_history=5, paths=2)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "b" and len(axes.lines) == 1 + 1 + 2 + 1
    past, median, *_, truth = axes.lines
    np.testing.assert_allclose(past.get_ydata(), history["b"].iloc[-AHEAD - 5 : -AHEAD])
    np.testing.assert_allclose(median.get_ydata(), np.median(output.samples[..., 1], axis=0))
    np.testing.assert_allclose(truth.get_ydata(), history["b"].iloc[-AHEAD:])
    assert past.get_xdata().tolist() == [-5, -4, -3, -2, -1] and truth.get_xdata().tolist() == [0, 1, 2, 3]
    assert len(output.plot(series=[1]).axes) == 1 and len(output.plot().axes) == 2
    with pytest.raises(ValueError, match="`series` 'c'"):
        output.plot(series=["c"])


def test_a_picture_of_a_series_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="`series`"):
        quick(small(), series(20)).plot(series=[2])


# bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "history, error, message",
    [
        (series(7), ValueError, "`history`.*7 times.*8"),
        ([series(20), series(7)], ValueError, "`history`.*7 times.*8"),
        (series(20, d=3), ValueError, "`history` has 3 series.*2"),
        (series(20)[:, 0], ValueError, r"`history`.*\(20,\)"),
        (np.zeros((1, 2, 20, 2)), ValueError, "`history`"),
        (np.zeros((20, 2), complex), ValueError, "complex|numbers"),
        ("exchange", TypeError, "`history`.*str"),
        (None, TypeError, "`history`.*NoneType"),
        (3, TypeError, "`history`.*int"),
        ([], ValueError, "`history` is an empty list"),
        ([["a"]], TypeError, "`history`.*list"),
        (np.zeros((0, 20, 2)), ValueError, "`history` is an empty"),
        (np.where(np.arange(40).reshape(20, 2) == 33, np.inf, 1.0), ValueError, "series_1.*inf"),
        (np.where(np.arange(2) == 1, np.nan, series(20)), ValueError, r"`history`.*\['series_1'\]"),
        (frame(), ValueError, "`history` has times"),
        ({"start": pd.Period("2024-01-01", "D"), "target": series(20)[:, 0]}, ValueError, "`target`"),
        ({"target": series(20).T}, ValueError, "start"),
        (pd.DataFrame(series(20), [0, 1, 2, *range(2, 19)]), ValueError, "row 3"),
        (pd.DataFrame({"a": ["x"] * 20, "b": 1.0}), ValueError, "'a'"),
    ],
)
def test_bad_histories(history, error, message):
    with pytest.raises(error, match=message):
        quick(small(), history)


def irregular():
    stamps = pd.date_range("2024-01-01", periods=20, freq="D").to_series()
    stamps.iloc[7] += pd.Timedelta(hours=5)
    return pd.DataFrame(series(20), stamps.to_numpy())


@pytest.mark.parametrize(
    "history, message",
    [
        (series(20), "`history` has no times.*'D'.*`start`"),
        (irregular(), "row 7"),
        (frame(20, "h"), "row 1"),  # several hours in a day
        (frame(20, "D").iloc[::-1], "row 1"),
        (frame(30, "W"), "'?W|frequency|`freq`"),  # one day in seven is known
    ],
)
def test_bad_clocks(history, message):
    with pytest.raises(ValueError, match=message):
        quick(clocked("D"), history)


@pytest.mark.parametrize("name", ["num_samples", "prediction_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"])
def test_bad_numbers(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        small()(series(20), **{name: value})


@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_bad_numbers_of_steps(value):
    with pytest.raises(ValueError, match="num_inference_steps"):
        small()(series(20), 2, num_inference_steps=value)


@pytest.mark.parametrize("differencing", [0, 1, 3])
@pytest.mark.parametrize("indicators", [False, True])
@pytest.mark.parametrize("where", [[-1], [-1, -2, -3], [0], list(range(-7, 0)), [-5]])
def test_gaps_leave_forecasts_finite(differencing, indicators, where):
    pipe = small(differencing=differencing, missing_indicators=indicators, context_length=8 - differencing)
    history = series(20, level=100)[-pipe.model.history_length :]
    complete = quick(pipe, history).samples
    history[where, 1] = np.nan
    samples = quick(pipe, history).samples
    assert np.isfinite(samples).all() and not np.array_equal(samples, complete)
    assert np.abs(samples[:, 0] - 100).max() < 100 if differencing else True  # near the last known value


@pytest.mark.parametrize("stride", [1, 3])
def test_gaps_are_filled_by_the_last_value_of_their_phase(stride):
    values = torch.arange(12.0).reshape(1, 12, 1).repeat(1, 1, 2)
    values[0, [0, 5, 8, 11], 0] = torch.nan
    filled = _filled(values, stride)[0]
    expected = torch.arange(12.0)
    for i, source in ((5, 5 - stride), (8, 8 - stride), (11, 11 - stride), (0, stride)):
        expected[i] = expected[source]
    assert torch.equal(filled[:, 0], expected) and torch.equal(filled[:, 1], values[0, :, 1])
    values[0, 1::3, 1] = torch.nan
    phase = _filled(values, 3)[0, 1::3, 1]
    torch.testing.assert_close(phase, values[0, :, 1].nanmean().expand(4))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("differencing", [0, 1])
@pytest.mark.parametrize("level", [0.0, 3.0, 1e6])
def test_constant_series_have_finite_forecasts(scaling, differencing, level):
    samples = quick(small(scaling=scaling, differencing=differencing), np.full((20, 2), level)).samples
    assert np.isfinite(samples).all()


def test_small_changes_of_large_values_are_not_lost():
    """Values near 1e8 have no fraction in float32, but their differences do."""
    pipe, history = small(scaling="mean", differencing=1), 1e8 + series(20)
    found = pipe.model.units.scale(pipe._values(pd.DataFrame(history))[None]).scale[0, 0]
    np.testing.assert_allclose(found, np.abs(np.diff(history[-8:], axis=0)).mean(0), rtol=1e-3)


def test_values_too_large_for_float32_are_forecast():
    samples = quick(small(), np.where(np.arange(40).reshape(20, 2) == 37, 1e39, 1.0)).samples
    assert np.isfinite(samples).all() and np.abs(samples[..., 1]).max() > 1e36
