"""Forecasting without training: units, encoders, denoisers, sampling against closed forms, inputs and outputs."""

import copy
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from gluonts.dataset.common import ListDataset
from gluonts.evaluation import MultivariateEvaluator, make_evaluation_predictions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_vsdm import AdaptiveDiagonalDrift, DataNormalizer, ForecastModel, VSDMForecastPipeline, VSDMScheduler
from diffusers_vsdm.data.calendar import calendar_features, default_lags, season_of, times_per_week
from diffusers_vsdm.data.frames import as_gluonts_entries, quiet_periods, regular_frame
from diffusers_vsdm.metrics.forecast import LEVELS, forecast_metrics
from diffusers_vsdm.models.denoisers import DENOISERS, DenoiserSizes
from diffusers_vsdm.models.encoders import ENCODERS
from diffusers_vsdm.models.series_units import LEAST_SCALE, MOST_UNITS, SCALINGS
from diffusers_vsdm.pipelines import pipeline_forecast
from diffusers_vsdm.pipelines.pipeline_forecast import VSDMForecastOutput, _filled


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

CONTEXT, AHEAD = 6, 4


def model(d=2, **given):
    chosen = {"prediction_length": AHEAD, "context_length": CONTEXT, "num_train_timesteps": 20, "lags": [1, 2]}
    chosen |= {"num_time_features": 2, "encoder_width": 8, "encoder_layers": 2, "denoiser_layers": 2}
    return ForecastModel(d, **(chosen | {"denoiser_channels": 8, "denoiser_width": 8} | given)).eval()


def randomized(module, std=0.3):
    """With a last layer that is not zero, so that inputs matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def series(rows, d=2, seed=0, level=5.0):
    """Random walks away from 0, whole in float32, as GluonTS keeps them."""
    walks = level + np.random.default_rng(seed).standard_normal((rows, d)).cumsum(0)
    return walks.astype(np.float32).astype(np.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# units ---------------------------------------------------------------------------------------------------------------


def window(forecaster, seed=0, batch=3, d=2):
    rows = forecaster.history_length + AHEAD
    values = torch.stack([torch.from_numpy(series(rows, d, seed + i)) for i in range(batch)])
    return values, torch.rand(batch, rows, 2, generator=generator(seed)) - 0.5


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(SCALINGS),
    st.sampled_from([0, 1, 3]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(0, 1000),
)
@example("standard", 0, [1], 362)  # jumps after a quiet past
def test_units_are_undone_by_location_and_scale(scaling, differencing, lags, seed):
    forecaster = model(scaling=scaling, differencing=differencing, lags=lags)
    values, calendar = window(forecaster, seed)
    values = values / 3  # mostly within the bound where the scale is 1
    _, z = forecaster.units.windows(values, calendar)
    units = forecaster.units.scale(values)
    again = forecaster.units.locations(values, units) + units.scale * z
    known, inside = values[:, forecaster.units.reach :], z.abs() < MOST_UNITS
    assert z.abs().max() <= MOST_UNITS and inside.float().mean() > 0.5
    assert forecaster.units.reach == max(*lags, differencing) and z.shape == (3, CONTEXT + AHEAD, 2)
    torch.testing.assert_close(again[inside], known[inside], rtol=1e-5, atol=1e-4)
    assert ((known - again) * z >= 0)[~inside].all()  # the truth lies beyond the bound


@pytest.mark.parametrize("differencing", [0, 2])
def test_scales_are_what_they_are_called(differencing):
    history = model(differencing=differencing).history_length
    values = torch.from_numpy(series(history + AHEAD))[None]
    past = values[0, :history].numpy()
    past = past[differencing:] - past[:-differencing] if differencing else past
    found = {name: model(scaling=name, differencing=differencing).units.scale(values) for name in SCALINGS}
    np.testing.assert_allclose(found["mean"].scale[0, 0], np.abs(past).mean(0))
    np.testing.assert_allclose(found["standard"].scale[0, 0], past.std(0))
    np.testing.assert_allclose(found["standard"].location[0, 0], 0 if differencing else past.mean(0))
    assert (found["none"].scale == 1).all() and (found["none"].location == 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("differencing", [0, 1, 3])
def test_nothing_of_the_future_is_read(scaling, differencing):
    """But for the scale, which is of the history: so what changes comes after it, or the scale is taken as it was."""
    forecaster = model(scaling=scaling, differencing=differencing, missing_indicators=True, lags=[1, 3])
    values, calendar = window(forecaster)
    units = forecaster.units.scale(values)
    inputs, z = forecaster.units.windows(values, calendar)
    for time in (forecaster.units.reach + 2, forecaster.history_length + 1):
        other = values.clone()
        other[:, time:] = 3 * torch.randn_like(other[:, time:]) + 7
        other[:, time + 1] = torch.nan
        seen = forecaster.units.inputs(
            other, calendar[:, forecaster.units.reach :], units, forecaster.units.locations(other, units)
        )
        upto = time - forecaster.units.reach
        assert torch.equal(seen[:, : upto + 1], inputs[:, : upto + 1])
        assert not torch.equal(seen[:, upto + 1], inputs[:, upto + 1])
    other_inputs, other_z = forecaster.units.windows(other, calendar)  # all of its changes are after the history
    assert torch.equal(other_inputs[:, : upto + 1], inputs[:, : upto + 1])
    assert torch.equal(other_z[:, :upto], z[:, :upto]) and not torch.equal(other_z[:, upto], z[:, upto])


def test_inputs_are_lags_indicators_size_and_calendar():
    forecaster = model(missing_indicators=True, lags=[3, 1], scaling="mean")
    forecaster.typical_scale.copy_(torch.tensor([2.0, 5.0]))
    values, calendar = window(forecaster)
    values[0, 5, 1] = torch.nan
    inputs, z = forecaster.units.windows(values, calendar)
    scale = forecaster.units.scale(values).scale
    parts = inputs.split([4, 4, 2, 2], dim=2)
    for time in range(forecaster.units.reach, values.shape[1]):
        i = time - forecaster.units.reach
        lagged = torch.cat([values[:, time - 1], values[:, time - 3]], dim=1) / scale[:, 0].repeat(1, 2)
        torch.testing.assert_close(parts[0][:, i], lagged.nan_to_num().float())
        assert torch.equal(parts[1][:, i], lagged.isnan().float())
        torch.testing.assert_close(parts[2][:, i], (scale[:, 0] / torch.tensor([2.0, 5.0])).log().float())
        assert torch.equal(parts[3][:, i], calendar[:, time])
        assert torch.equal(z[:, i].isnan(), values[:, time].isnan())
    assert parts[1].sum() == 2  # read once by each lag


def test_a_difference_to_a_missing_value_is_missing():
    forecaster = model(differencing=2, missing_indicators=True)
    values, calendar = window(forecaster)
    values[1, 5, 0] = torch.nan
    inputs, z = forecaster.units.windows(values, calendar)
    assert z.isnan().nonzero().tolist() == [[1, 5 - 2, 0], [1, 7 - 2, 0]]
    assert inputs.isfinite().all()
    indicators = inputs[1, :, 4:8].unflatten(1, (2, 2))[..., 0]  # (time, lag, the first series)
    expected = torch.zeros_like(indicators)
    expected[[4, 5], [0, 1]] = 1  # as the value 1 and 2 times before
    expected[5] = 1  # and as what the difference is to: of lag 2 these are one
    assert torch.equal(indicators, expected)


@pytest.mark.parametrize("differencing", [0, 1])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("level", [0.0, 3.0, torch.nan])
def test_a_window_that_rests_has_a_scale(scaling, differencing, level):
    forecaster = model(scaling=scaling, differencing=differencing)
    forecaster.typical_scale.copy_(torch.tensor([2.0, 40.0]))
    values = torch.full((1, forecaster.history_length, 2), level, dtype=torch.float64)
    scale = forecaster.units.scale(values).scale[0, 0]
    if scaling == "none":
        expected = torch.ones(2)
    elif level != level:
        expected = forecaster.typical_scale
    elif scaling == "mean" and not differencing:
        expected = torch.maximum(LEAST_SCALE * forecaster.typical_scale, torch.tensor(level))
    else:
        expected = LEAST_SCALE * forecaster.typical_scale
    torch.testing.assert_close(scale.float(), expected)


def test_jumps_count_as_ten_units():
    forecaster = model(scaling="none")
    values, calendar = torch.zeros(1, forecaster.history_length + AHEAD, 2), torch.zeros(1, 12, 2)
    values[0, 7] = torch.tensor([1e4, -1e4])
    inputs, z = forecaster.units.windows(values, calendar)
    assert z[0, 5].tolist() == [10, -10] and inputs[0, 6, :2].tolist() == [10, -10]


def test_bad_settings_of_a_model():
    for name, value in [("num_series", 0), ("prediction_length", 0), ("context_length", -1)]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            model(**({"d": value} if name == "num_series" else {name: value}))
    for wrong in ({"lags": []}, {"lags": [0, 1]}, {"differencing": -1}):
        with pytest.raises(ValueError, match="`lags`.*`differencing`"):
            model(**wrong)
    for name in ("scaling", "encoder_type", "denoiser_type"):
        with pytest.raises(ValueError, match=f"`{name}`.*'what'"):
            model(**{name: "what"})
    forecaster = model()
    with pytest.raises(ValueError, match="`condition`.*`inputs`"):
        forecaster(torch.zeros(1, 2), 3)
    with pytest.raises(ValueError, match=r"`sample`.*\(3, 2\)"):
        forecaster(torch.zeros(2, 2), 3, condition=torch.zeros(3, 12))


# networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoding_goes_on_from_a_state(kind):
    forecaster = randomized(model(encoder_type=kind))
    inputs = torch.randn(3, CONTEXT + AHEAD, 8, generator=generator())
    with torch.no_grad():
        whole, _ = forecaster.encode(inputs)
        found, state = forecaster.encode(inputs[:, :CONTEXT])
        parts = [found]
        for i in range(CONTEXT, CONTEXT + AHEAD):
            found, state = forecaster.encode(inputs[:, i : i + 1], state)
            parts.append(found)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (3, CONTEXT + AHEAD, 8 + 4) and torch.equal(whole[..., 8:], inputs[..., :4])
    assert whole[:, 1:, :8].sub(whole[:, :-1, :8]).abs().amax((0, 2)).min() > 1e-3  # it knows where it is


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_does_not_look_ahead(kind):
    forecaster = randomized(model(encoder_type=kind))
    inputs = torch.randn(2, 8, 8, generator=generator()).requires_grad_()
    (gradient,) = torch.autograd.grad(forecaster.encode(inputs)[0][:, 4].sum(), inputs)
    assert (gradient[:, 5:] == 0).all() and (gradient[:, :5].abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_repeated_state_is_each_window_several_times_in_a_row(kind):
    forecaster = randomized(model(encoder_type=kind))
    first, then = torch.randn(2, 5, 8, generator=generator()), torch.randn(6, 1, 8, generator=generator(1))
    with torch.no_grad():
        state = forecaster.encoder.repeat(forecaster.encode(first)[1], 3)
        found = forecaster.encode(then, state)[0]
        for row in range(6):
            _, alone = forecaster.encode(first[row // 3 : row // 3 + 1])
            expected = forecaster.encode(then[row : row + 1], alone)[0]
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_denoisers_of_few_and_more_series(kind, d):
    network = randomized(DENOISERS[kind](DenoiserSizes(d, 6, 3, 20, 4, 8, 8))).eval()
    x, hidden, known = (torch.randn(5, *shape, generator=generator(i)) for i, shape in enumerate([(d,), (6,), (3, d)]))
    k = torch.tensor([0, 3, 7, 12, 19])
    with torch.no_grad():
        output = network(x, k, hidden, known)
        assert output.shape == (5, d) and output.isfinite().all()
        order = torch.tensor([3, 0, 4, 1, 2])
        permuted = network(x[order], k[order], hidden[order], known[order])
        torch.testing.assert_close(permuted, output[order], rtol=1e-4, atol=1e-5)
        for at in (7, torch.tensor(7), torch.full((5,), 7)):
            torch.testing.assert_close(network(x, at, hidden, known)[2], output[2], rtol=1e-4, atol=1e-5)
        for changed in ((x + 1, k, hidden, known), (x, k, hidden + 1, known), (x, k, hidden, known + 1)):
            assert (network(*changed) - output).abs().amax(1).min() > 0
        assert (network(x, k.flip(0), hidden, known) - output).abs()[[0, 1, 3, 4]].amax(1).min() > 0


@pytest.mark.parametrize("kind", DENOISERS)
def test_each_series_knows_all_others_in_a_ring_of_eight(kind):
    """With as many layers as by default."""
    network = randomized(DENOISERS[kind](DenoiserSizes(8, 6, 1, 20, 8, 8, 8))).eval()
    x = torch.randn(1, 8, generator=generator()).requires_grad_()
    hidden, known = torch.zeros(1, 6), torch.zeros(1, 1, 8)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, 3, hidden, known)[0], x)[:, 0]
    assert (jacobian.abs() > 0).all()


# sampling ------------------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """The perfect answer for z_t ~ N(mean + phi * z_{t-1}, sigma^2), z_{t-1} as the lags tell it."""

    def __init__(self, scheduler, mean, phi, sigma, normalizer=None, differencing=0):
        super().__init__()
        self.scheduler, self.normalizer, self.differencing = scheduler, normalizer, differencing
        self.mean, self.phi, self.sigma = (torch.tensor(x) for x in (mean, phi, sigma))

    def forward(self, sample, timestep, hidden, known):
        before = -known[:, 1] if self.differencing else known[:, 0]  # of differences, (x_{t-2} - x_{t-1}) / c
        mean, sigma = self.mean + self.phi * before, self.sigma
        if self.normalizer is not None:
            mean, sigma = self.normalizer.normalize(mean), sigma / self.normalizer.std
        a, s = self.scheduler.marginal_scales(sample, torch.as_tensor(timestep).expand(len(sample)))
        off = (sample - a * mean) / (a**2 * sigma**2 + s**2)
        x0, eps = mean + a * sigma**2 * off, s * off
        return eps if self.scheduler.config.prediction_type == "epsilon" else a * eps - s * x0


PHI, MEAN, SIGMA = [0.7, -0.4], [0.3, -0.2], [0.5, 0.8]


def pipeline(
    lam=(1.0, 1.0),
    solver="trig",
    prior="conditional",
    beta_max=30.0,
    prediction="v_prediction",
    process=None,
    phi=(0.0, 0.0),
    **chosen,
):
    """With a process that is long enough to forget any data."""
    scheduler = VSDMScheduler.from_power_law(
        0.1, beta_max, 1.7, 200, solver=solver, prior_type=prior, prediction_type=prediction, clip_sample=False
    )
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor(lam, dtype=torch.float64))
    phi, mean, std = torch.tensor(phi), torch.tensor(MEAN), torch.tensor(SIGMA)
    mean, std = mean / (1 - phi), std / (1 - phi**2).sqrt()  # in the long run
    drift.data_mean.copy_(mean if process is None else process.normalize(mean))
    drift.data_variance.copy_(std**2 if process is None else (std / process.std) ** 2)
    scheduler.set_drift(drift)
    pipe = VSDMForecastPipeline(model(num_train_timesteps=200, **chosen), scheduler, process)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact(phi=PHI, sigma=SIGMA, **given):
    pipe = pipeline(phi=phi, **given)
    differencing = pipe.model.config["differencing"]
    pipe.model.denoiser = Exact(pipe.scheduler, MEAN, phi, sigma, pipe.normalizer, differencing)
    return pipe


def closed_form(pipe, history):
    """Mean `(P, d)` and covariance `(d, P, P)` of the paths, in data units, in NumPy alone."""
    phi, sigma, mean = (np.asarray(x) for x in (pipe.model.denoiser.phi, pipe.model.denoiser.sigma, MEAN))
    config, past = pipe.model.config, history[-pipe.model.history_length :]
    changes = np.diff(past, axis=0) if config["differencing"] else past
    location = np.zeros(2)
    if config["scaling"] == "none":
        scale = np.ones(2)
    elif config["scaling"] == "mean":
        scale = np.abs(changes).mean(0)
    else:
        scale = changes.std(0)
        location = location if config["differencing"] else changes.mean(0)
    z = (changes[-1] - location) / scale
    means = []
    for _ in range(AHEAD):
        z = mean + phi * z
        means.append(z)
    lag = np.subtract.outer(np.arange(AHEAD), np.arange(AHEAD))
    mix = np.stack([np.where(lag >= 0, p ** np.maximum(lag, 0), 0) for p in phi]) * (sigma * scale)[:, None, None]
    paths = np.stack(means) * scale + location
    if config["differencing"]:
        paths, mix = past[-1] + paths.cumsum(0), mix.cumsum(1)
    return paths, mix @ mix.swapaxes(1, 2)


@pytest.mark.parametrize(
    "given, steps",
    [
        ({"scaling": "none"}, 10),
        ({"scaling": "mean"}, 10),
        ({"scaling": "mean", "solver": "ddim"}, 199),
        ({"scaling": "mean", "prediction": "epsilon", "solver": "heun"}, 60),
        ({"scaling": "standard", "solver": "ddpm"}, 200),
        ({"scaling": "standard", "solver": "dpmsolver++"}, 60),
        ({"scaling": "mean", "differencing": 1}, 10),
        ({"scaling": "none", "differencing": 1, "phi": [0.0, 0.0]}, 10),  # a random walk
        ({"scaling": "mean", "lam": (0.7, 1.9)}, 10),
        ({"scaling": "standard", "differencing": 1, "lam": (0.7, 1.9), "solver": "heun"}, 100),
        ({"scaling": "mean", "lam": (0.7, 1.9), "prior": "marginal"}, 10),
        # short, and no dependence on the past: the marginal is the law of the data
        ({"scaling": "mean", "lam": (0.7, 1.9), "prior": "marginal", "beta_max": 2.0, "phi": [0.0, 0.0]}, 10),
        ({"scaling": "mean", "normalized": True, "lam": (0.7, 1.9)}, 10),
    ],
)
def test_paths_have_the_law_of_a_perfect_network(given, steps):
    # of first order, or of few steps, solvers make errors of their own: some percent of a variance
    given, n = dict(given), 1500 if "solver" in given else 6000
    if given.pop("normalized", False):
        given["process"] = DataNormalizer((2,))
        given["process"].mean.copy_(torch.tensor([0.5, -1.0]))
        given["process"].std.copy_(torch.tensor([0.6, 3.0]))
    pipe = exact(**given)
    history = series(20, level=0) / 3
    samples = pipe(history, n, num_inference_steps=steps, generator=generator()).samples
    assert samples.shape == (n, AHEAD, 2) and samples.dtype == np.float64
    mean, covariance = closed_form(pipe, history)
    variance = np.diagonal(covariance, axis1=1, axis2=2).T
    assert (np.abs(samples.mean(0) - mean) < 4 * np.sqrt(variance / n)).all()
    for i in range(2):
        found, wanted, v = np.cov(samples[..., i].T), covariance[i], variance[:, i]
        assert (np.abs(found - wanted) < 4 * np.sqrt((np.outer(v, v) + wanted**2) / n)).all()
    if given.get("phi") == [0.0, 0.0] and given.get("differencing"):
        np.testing.assert_allclose(variance, np.outer(np.arange(1, 5), np.square(SIGMA)), rtol=1e-6)


def test_the_law_of_a_perfect_network_needs_the_marginal_prior_in_a_short_process():
    """The check of the case above can fail: from the other prior the paths are wider by far."""
    given = {"scaling": "none", "lam": (0.7, 1.9), "beta_max": 2.0, "phi": [0.0, 0.0]}
    spread = [
        exact(prior=prior, **given)(series(20), 2000, num_inference_steps=10, generator=generator()).samples.std(
            axis=(0, 1)
        )
        / SIGMA
        for prior in ("marginal", "conditional")
    ]
    assert np.abs(spread[0] - 1).max() < 0.05 and np.abs(spread[1] - 1).max() > 0.1


@pytest.mark.parametrize("beta_max, lam", [(10.0, (1.0, 1.0)), (10.0, (0.4, 0.7)), (3.0, (1.0, 1.0))])
def test_a_short_process_draws_forecasts_to_the_marginal_prior(beta_max, lam):
    """By as much as docs/forecasting.md says: the prior does not know the past, and x_T still does."""
    pipe = exact(scaling="none", prior="marginal", beta_max=beta_max, lam=lam)
    history, n = series(20, level=0), 4000
    output = pipe(history, n, prediction_length=1, num_inference_steps=20, generator=generator())
    samples = output.samples[:, 0]
    wanted = closed_form(pipe, history)[0][0]
    sigma, drift = np.asarray(SIGMA), pipe.scheduler.drift
    a = np.exp(-0.5 * np.asarray(lam) * float(pipe.scheduler.integrated_beta[-1]))
    s2, m, v = (1 - a**2) / lam, drift.data_mean.numpy(), drift.data_variance.numpy()
    remaining = np.sqrt(a**2 * sigma**2 + s2)
    mean = wanted + a * sigma / remaining * (m - wanted)
    std = sigma * np.sqrt(a**2 * v + s2) / remaining
    assert (np.abs(samples.mean(0) - mean) < 4 * std / np.sqrt(n)).all()
    np.testing.assert_allclose(samples.std(0), std, rtol=0.05)
    assert (np.abs(mean - wanted) > 10 * std / np.sqrt(n)).any()  # or the check above shows nothing


@pytest.mark.parametrize("batch_size", [7, 64, 4096])
def test_a_history_is_forecast_the_same_whoever_is_with_it(batch_size):
    """With no noise in the data there is one path, whatever is drawn."""
    pipe = exact(sigma=[0.0, 0.0], scaling="mean", differencing=1)
    histories = [series(10 + i, seed=i) for i in range(3)]
    together = pipe(histories, 12, num_inference_steps=20, batch_size=batch_size).samples
    assert together.shape == (3, 12, AHEAD, 2)
    for history, samples in zip(histories, together, strict=True):
        expected, _ = closed_form(pipe, history)
        np.testing.assert_allclose(samples, np.broadcast_to(expected, samples.shape), rtol=1e-3)
        alone = pipe(history, 3, num_inference_steps=20).samples
        np.testing.assert_allclose(samples[:3], alone, rtol=1e-4)


def test_only_the_history_that_is_needed_is_read():
    pipe = small()
    history = series(30)
    needed = pipe.model.history_length
    other = history.copy()
    other[:-needed] = 1000.0
    expected = pipe(history, 3, generator=generator(), num_inference_steps=5).samples
    assert np.array_equal(pipe(other, 3, generator=generator(), num_inference_steps=5).samples, expected)
    shifted = [pipe(history[-needed - i :], 3, generator=generator(), num_inference_steps=5) for i in (0, 1)]
    assert not np.array_equal(shifted[0].samples, expected) or pipe.model.config["season_length"] == 1
    other[-needed] += 1
    assert not np.array_equal(pipe(other, 3, generator=generator(), num_inference_steps=5).samples, expected)


# the pipeline --------------------------------------------------------------------------------------------------------


def small(freq=None, solver="trig", features=2, **given):
    pipe = pipeline(solver=solver, lam=(0.7, 1.9), prior="marginal", freq=freq, num_time_features=features, **given)
    randomized(pipe.model)
    return pipe


def clocked(freq="B", **given):
    return small(freq, features=calendar_features(frame(3, freq).index).shape[1], **given)


def frame(rows=20, freq="B", start="2024-01-03", names=("a", "b"), seed=0):
    stamps = pd.date_range(start, periods=rows, freq={"M": "ME"}.get(freq, freq))
    return regular_frame(pd.DataFrame(series(rows, seed=seed), stamps, list(names)), freq)


def quick(pipe, history, num_samples=3, seed=0, **given):
    return pipe(history, num_samples, generator=generator(seed), num_inference_steps=4, **given)


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


# the output ----------------------------------------------------------------------------------------------------------


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


# bad input -----------------------------------------------------------------------------------------------------------


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


# GluonTS -------------------------------------------------------------------------------------------------------------


def evaluated(pipe, dataset, num_samples=20):
    predictor = pipe.predictor(num_inference_steps=4, seed=5)
    forecasts, truth = make_evaluation_predictions(dataset, predictor, num_samples)
    forecasts, truth = list(forecasts), list(truth)
    evaluator = MultivariateEvaluator(quantiles=LEVELS, target_agg_funcs={"sum": np.sum}, num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the evaluator's own
        return forecasts, evaluator(truth, forecasts)[0]


def as_list_dataset(frames):
    entries = [{"target": f.to_numpy().T, "start": f.index[0]} for f in frames]
    return ListDataset(entries, freq=frames[0].index.freqstr, one_dim_target=False)


@pytest.mark.parametrize("make", [as_list_dataset, as_gluonts_entries])
@pytest.mark.parametrize("freq", ["h", "D"])
def test_gluonts_evaluates_the_pipeline(make, freq):
    pipe = clocked(freq, series_names=["a", "b"])
    frames = [frame(20 + i, freq, seed=i) for i in range(3)]
    forecasts, found = evaluated(pipe, make(frames))
    assert [f.start_date for f in forecasts] == [f.index[-AHEAD] for f in frames]
    assert all(f.samples.shape == (20, AHEAD, 2) for f in forecasts)
    histories = [f.iloc[:-AHEAD] for f in frames]
    output = pipe(histories, 20, num_inference_steps=4, generator=generator(5))
    np.testing.assert_array_equal(np.stack([f.samples for f in forecasts]), output.samples)
    ours = forecast_metrics(output.samples, [f.iloc[-AHEAD:] for f in frames])
    assert ours["crps_sum"] == pytest.approx(found["m_sum_mean_wQuantileLoss"], rel=1e-6)
    assert ours["crps"] == pytest.approx(found["mean_wQuantileLoss"], rel=1e-6)
    assert ours["nrmse_sum"] == pytest.approx(found["m_sum_NRMSE"], rel=1e-6)
    one = pipe(make(histories), 20, num_inference_steps=4, generator=generator(5))  # a data set is histories too
    np.testing.assert_array_equal(one.samples, output.samples)


def test_business_days_through_gluonts():
    """The warnings are GluonTS's and pandas' own; the dates are to be right."""
    pipe = clocked("B")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        frames = [frame(21, "B", start="2024-01-01")]
        (forecast,), _ = evaluated(pipe, as_gluonts_entries(frames))
        assert str(forecast.start_date) == "2024-01-24" and forecast.start_date.freqstr == "B"


def test_a_model_without_a_clock_through_gluonts():
    pipe = small()
    frames = [regular_frame(pd.DataFrame(series(20, seed=i))) for i in range(2)]
    forecasts, found = evaluated(pipe, as_gluonts_entries(frames))
    output = pipe([f.iloc[:-AHEAD] for f in frames], 20, num_inference_steps=4, generator=generator(5))
    np.testing.assert_array_equal(np.stack([f.samples for f in forecasts]), output.samples)
    assert np.isfinite(found["m_sum_mean_wQuantileLoss"])


def test_a_predictor_draws_the_same_only_with_a_seed():
    pipe, entries = clocked("D"), as_gluonts_entries([frame(20, "D")])
    with_seed, without = pipe.predictor(4, seed=1), pipe.predictor(4)
    assert with_seed.prediction_length == AHEAD
    first, again = (next(iter(with_seed.predict(entries, 3))).samples for _ in range(2))
    assert np.array_equal(first, again)
    free, other = (next(iter(without.predict(entries, 3))).samples for _ in range(2))
    assert not np.array_equal(free, other)


# metrics -------------------------------------------------------------------------------------------------------------


def test_a_perfect_point_forecast_scores_nothing():
    truth = [series(AHEAD, d=3, seed=i) for i in range(2)]
    samples = [np.repeat(window[None], 5, axis=0) for window in truth]
    found = forecast_metrics(samples, truth)
    assert list(found) == ["crps_sum", "crps", "nd_sum", "nrmse_sum"]
    assert max(map(abs, found.values())) < 1e-15


def quantile_losses(paths, truth):
    """Of each level, `2 |(q - y) (1[y <= q] - level)|` summed, by GluonTS's quantiles: order statistics, no means."""
    ordered = np.sort(paths, axis=0)
    found = []
    for level in LEVELS:
        q = ordered[int(np.round((len(paths) - 1) * level))]
        found.append(2 * np.abs((q - truth) * ((truth <= q) - level)).sum())
    return np.array(found)


def test_scores_by_hand():
    rng = np.random.default_rng(0)
    samples = [rng.normal(3, 2, (7, 2, 3)) for _ in range(2)]
    truth = [rng.normal(2, 1, (2, 3)) for _ in range(2)]
    found = forecast_metrics(samples, truth)
    summed = [s.sum(-1) for s in samples], [t.sum(-1) for t in truth]
    total = sum(np.abs(t).sum() for t in summed[1])
    by_hand = sum(quantile_losses(s, t) for s, t in zip(*summed, strict=True)).mean() / total
    assert found["crps_sum"] == pytest.approx(by_hand)
    of_each = sum(quantile_losses(s, t) for s, t in zip(samples, truth, strict=True)).mean()
    assert found["crps"] == pytest.approx(of_each / sum(np.abs(t).sum() for t in truth))
    medians, means = ([f(s, axis=0) for s in summed[0]] for f in (np.median, np.mean))
    off = np.concatenate(medians) - np.concatenate(summed[1])
    assert found["nd_sum"] == pytest.approx(np.abs(off).sum() / total)
    off = np.concatenate(means) - np.concatenate(summed[1])
    assert found["nrmse_sum"] == pytest.approx(np.sqrt((off**2).mean()) / (total / 4))


@pytest.mark.parametrize(
    "samples, truth, message",
    [
        ([], [], "0 forecasts and 0"),
        ([np.zeros((3, 2, 2))], [np.zeros((2, 2))] * 2, "1 forecasts and 2"),
        ([np.zeros((3, 2, 2))], [np.zeros((3, 2))], r"\(3, 2, 2\).*\(num_samples, \*\(3, 2\)\)"),
        ([np.zeros((2, 2))], [np.zeros((2, 2))], r"\(2, 2\)"),
        ([np.full((3, 2, 2), np.nan)], [np.zeros((2, 2))], "forecast holds NaN"),
        ([np.zeros((3, 2, 2))], [np.full((2, 2), np.nan)], "truth holds missing"),
    ],
)
def test_bad_forecasts_have_no_score(samples, truth, message):
    with pytest.raises(ValueError, match=message):
        forecast_metrics(samples, truth)


# the calendar --------------------------------------------------------------------------------------------------------

FREQUENCIES = ["s", "min", "15min", "h", "2h", "D", "B", "W", "W-WED", "M", "Q", "Y"]


def index_of(freq, periods=500):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return pd.period_range("2023-12-28", periods=periods, freq=freq)


@pytest.mark.parametrize("freq", FREQUENCIES)
def test_a_calendar_lies_between_minus_one_and_one(freq):
    index = index_of(freq)
    features = calendar_features(index)
    assert features.shape[0] == len(index) and features.dtype == torch.float32
    assert features.shape[1] > 0 or freq == "Y"
    assert (features.abs() <= 1).all()
    if freq in ("h", "D", "B", "M"):
        assert features.amin() == -1 and features.amax() > 0.9
    assert torch.equal(calendar_features(index[100:]), features[100:])


@pytest.mark.parametrize(
    "freq, season, lags",
    [
        ("h", 24, [1, 2, 3, 24, 168]),
        ("15min", 96, [1, 2, 3, 96, 672]),
        ("D", 1, [1, 2, 3]),
        ("B", 5, [1, 2, 3, 5]),
        ("W", 1, [1, 2, 3]),
        ("M", 12, [1, 2, 3, 12]),
        ("Q", 4, [1, 2, 3, 4]),
        (None, 1, [1, 2, 3]),
    ],
)
def test_lags_of_a_frequency(freq, season, lags):
    name = None
    if freq is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            name = index_of(freq).freqstr
    assert season_of(name) == season
    assert default_lags(season, times_per_week(name)) == lags


@pytest.mark.parametrize("first", [0, 5, 7000])
def test_the_phase_of_numbers_is_theirs(first):
    features = calendar_features(pd.RangeIndex(first, first + 20), season_length=7)
    angle = 2 * np.pi * np.arange(first, first + 20) / 7
    np.testing.assert_allclose(features, np.stack([np.sin(angle), np.cos(angle)], axis=1), atol=1e-3)


def test_a_copy_of_a_pipeline_forecasts_the_same():
    pipe = small()
    clone = VSDMForecastPipeline(copy.deepcopy(pipe.model), copy.deepcopy(pipe.scheduler))
    clone.set_progress_bar_config(disable=True)
    assert np.array_equal(quick(clone, series(20)).samples, quick(pipe, series(20)).samples)
