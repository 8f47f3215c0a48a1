"""The pipeline through GluonTS."""

import warnings

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.common import ListDataset
from gluonts.evaluation import MultivariateEvaluator, make_evaluation_predictions

from diffusers_vsdm.data.frames import as_gluonts_entries, regular_frame
from diffusers_vsdm.metrics.forecast import LEVELS, forecast_metrics

from .forecasting import AHEAD, clocked, frame, generator, series, small


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


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
