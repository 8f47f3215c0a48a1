"""What a clock says: features of times, and the lags and seasons that go with a frequency."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor


MOST_LAG = 2016  # a week of five minutes


def season_of(freq: str | None) -> int:
    """Times in the season of a frequency: 24 for hours, 5 for business days; 1 if there is none, or no clock."""
    if freq is None:
        return 1
    from gluonts.time_feature import get_seasonality

    return get_seasonality(_offset_name(freq))


def default_lags(season_length: int, per_week: int = 0) -> list[int]:
    """Few lags: the last three times, a season before, and, where a week has several seasons, a week before.

    A week of more than some 2,000 times is too long a way back to ask for.
    """
    has_weeks = season_length < per_week <= MOST_LAG
    return sorted({1, 2, 3, season_length, *([per_week] if has_weeks else [])})


def times_per_week(freq: str | None) -> int:
    """How many times of this frequency a week has, if it is finer than a day; else 0."""
    if freq is None:
        return 0
    import pandas as pd

    offset = pd.tseries.frequencies.to_offset(_offset_name(freq))
    step = pd.Timedelta(offset) if isinstance(offset, pd.offsets.Tick) else None
    return int(pd.Timedelta(days=7) / step) if step is not None and step < pd.Timedelta(days=1) else 0


def _offset_name(freq: str) -> str:
    """Of a frequency of periods, as offsets are named since pandas 2.2."""
    return re.sub(r"^(\d*)([MQY])(?=$|-)", r"\1\2E", freq)


def calendar_features(index: Any, season_length: int = 1) -> Tensor:
    """Features of the times of an index, each in [-1, 1]: `(len(index), features)` in float32.

    Args:
        index (`pd.PeriodIndex` or `pd.RangeIndex`): Of a clock, where the features are GluonTS's for its frequency; or
            of none, where they are sine and cosine of the place in a season.
        season_length: Times in a season, for an index without a clock.
    """
    if not hasattr(index, "freqstr"):
        rows = np.asarray(index) // index.step
        phase = 2 * np.pi * (rows % season_length) / season_length
        return torch.from_numpy(np.stack([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32))
    from gluonts.time_feature import time_features_from_frequency_str

    from .frames import quiet_periods

    with quiet_periods():
        features = [feature(index) for feature in time_features_from_frequency_str(_offset_name(index.freqstr))]
    if not features:  # of years there are none
        return torch.zeros(len(index), 0)
    return torch.from_numpy(2 * np.stack(features, axis=1).astype(np.float32))  # GluonTS's lie in [-1/2, 1/2]
