r"""The units of series: what a forecaster models of a window, and what it is told of the past.

At each time t the values $x_t$ of all series are a vector, and what is modelled is $z_t = (x_t - l_t) / c$: with a
scale c for each series and window, and a location l, 0 for the levels themselves or $x_{t-m}$ for differences over m
times. All of it is in float64 on the CPU: small changes of large values are not lost.

References:
    Salinas et al. (2020), "DeepAR: Probabilistic Forecasting with Autoregressive Recurrent Networks": scaling, lags.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


SCALINGS = ("mean", "standard", "none")
LEAST_SCALE = 0.1  # of the typical one: a series that rests in a window, a pegged currency, moves another day
MOST_UNITS = 10.0  # what lies beyond, when it does, would be most of a variance


class Scale(NamedTuple):
    """Units of a window: `(batch, 1, d)` each."""

    location: Tensor
    scale: Tensor


@dataclass(frozen=True)
class SeriesUnits:
    """How values become what is modelled, and what is read.

    Args:
        lags, differencing, scaling, missing_indicators, context_length: As of [`ForecastModel`].
        typical_scale (`Tensor`): Scale of each series in the training data, `(d,)` in float64; for `none` its mean
            absolute value there.
    """

    lags: list[int]
    differencing: int
    scaling: str
    missing_indicators: bool
    context_length: int
    typical_scale: Tensor

    @property
    def reach(self) -> int:
        """Times before the one that is predicted that its inputs know of."""
        return max(*self.lags, self.differencing)

    @property
    def history_length(self) -> int:
        """Times that a forecast needs to know of."""
        return self.context_length + self.reach

    def scale(self, values: Tensor) -> Scale:
        """Units of a window, by its first `history_length` values: `(batch, >= history_length, d)`, NaN where missing.

        They are a tenth of the typical ones at least, and those where nothing is known of a series.
        """
        differencing, scaling = self.differencing, self.scaling
        context = values[:, : self.history_length]
        if differencing:
            context = context[:, differencing:] - context[:, :-differencing]
        location = torch.zeros_like(context[:, :1])
        if scaling == "none":
            return Scale(location, torch.ones_like(location))
        if scaling == "standard" and not differencing:
            location = context.nanmean(1, keepdim=True).nan_to_num()
        if scaling == "standard":
            about = context.nanmean(1, keepdim=True)
            scale = (context - about).square().nanmean(1, keepdim=True).sqrt()
        else:
            scale = context.abs().nanmean(1, keepdim=True)
        typical = self.typical_scale
        return Scale(location, torch.where(scale.isnan(), typical, scale.maximum(LEAST_SCALE * typical)))

    @property
    def most(self) -> Tensor:
        """What counts as no more, in the units of what is modelled, `(d,)`."""
        return MOST_UNITS * (self.typical_scale if self.scaling == "none" else torch.ones_like(self.typical_scale))

    def locations(self, values: Tensor, units: Scale) -> Tensor:
        """Location of each time from the `reach`-th on, `(batch, length, d)`, for values `(batch, reach + length, d)`.

        For differences where the value before is missing it is missing too.
        """
        length, differencing = values.shape[1] - self.reach, self.differencing
        if not differencing:
            return units.location.expand(-1, length, -1)
        return values[:, self.reach - differencing : self.reach - differencing + length]

    def inputs(self, values: Tensor, calendar: Tensor, units: Scale, locations: Tensor) -> Tensor:
        """What the encoder reads at each time from the `reach`-th on: `(batch, length, features)` in float32.

        Args:
            values: `(batch, >= reach + length - 1, d)`, NaN where missing; the last one need not be known.
            calendar: Features of these times, `(batch, length, num_time_features)`.
            units, locations: See [`scale`] and [`locations`].
        """
        length = calendar.shape[1]
        lagged = torch.stack([values[:, self.reach - lag : self.reach - lag + length] for lag in self.lags], dim=2)
        lagged = (lagged - locations[:, :, None]) / units.scale[:, :, None]
        parts = [lagged.nan_to_num().clamp(-self.most, self.most).flatten(2)]
        if self.missing_indicators:
            parts.append(lagged.isnan().to(lagged.dtype).flatten(2))
        size = (units.scale / self.typical_scale).log().expand(-1, length, -1)
        return torch.cat([*parts, size, calendar.to(lagged.dtype)], dim=2).float()

    def windows(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `(batch, length, features)` and $z_t$ `(batch, length, d)`, see [`modelled`], of windows; float32.

        Args:
            values: `(batch, reach + length, d)`, NaN where missing; length is that of context and prediction.
            calendar: `(batch, reach + length, num_time_features)`.
        """
        units = self.scale(values)
        locations = self.locations(values, units)
        return self.inputs(values, calendar[:, self.reach :], units, locations), self._modelled(
            values, units, locations
        )

    def modelled(self, values: Tensor) -> Tensor:
        """$z_t$ of windows, `(batch, length, d)` in float32, NaN where missing; beyond ten units it counts as ten.

        Args:
            values: `(batch, reach + length, d)`, NaN where missing.
        """
        units = self.scale(values)
        return self._modelled(values, units, self.locations(values, units))

    def _modelled(self, values: Tensor, units: Scale, locations: Tensor) -> Tensor:
        return ((values[:, self.reach :] - locations) / units.scale).clamp(-self.most, self.most).float()
