"""Scores of forecasts."""

import numpy as np
import pytest

from diffusers_vsdm.metrics.forecast import LEVELS, forecast_metrics

from .forecasting import AHEAD, series


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


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
