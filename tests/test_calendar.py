"""What a model is told of the time."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from diffusers_vsdm.data.calendar import calendar_features, default_lags, season_of, times_per_week


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

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
