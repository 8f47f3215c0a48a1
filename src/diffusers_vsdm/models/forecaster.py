r"""`ForecastModel`: an encoder of the past and a denoiser of the next values of d series, in units of their own.

At each time t the values $x_t$ of all series are a vector, and the model is of $z_t = (x_t - l_t) / c$: with a scale c
for each series and window, and a location l, 0 for the levels themselves or $x_{t-m}$ for differences over m times.
The encoder reads, up to t, the values at some lags before it in the same units, which of them are missing, the
calendar, and $\log c$. The denoiser is given its hidden vector, and again the lagged values of each series, which need
not pass through so narrow a door.

References:
    Rasul et al. (2021), "Autoregressive Denoising Diffusion Models for Multivariate Probabilistic Time Series
        Forecasting".
    Salinas et al. (2020), "DeepAR: Probabilistic Forecasting with Autoregressive Recurrent Networks": scaling, lags.
"""

from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .denoisers import DENOISERS
from .encoders import ENCODERS
from .mlp import MLPModelOutput


SCALINGS = ("mean", "standard", "none")
LEAST_SCALE = 0.1  # of the typical one: a series that rests in a window, a pegged currency, moves another day
MOST_UNITS = 10.0  # what lies beyond, when it does, would be most of a variance


class Scale(NamedTuple):
    """Units of a window: `(batch, 1, d)` each."""

    location: Tensor
    scale: Tensor


class ForecastModel(ModelMixin, ConfigMixin):
    r"""Predicts the noise in $z_t$, or whatever the scheduler says, given the past.

    Args:
        num_series (`int`): Series d.
        prediction_length (`int`): Times to predict, P.
        context_length (`int`): Times that the encoder reads before them.
        num_train_timesteps (`int`): N of the scheduler.
        lags (`list[int]`): Times back at which values are read, positive.
        num_time_features (`int`): Features of the calendar.
        differencing (`int`, defaults to 0): m: what is modelled is the difference to the value m times before; 0 for
            the value itself.
        scaling (`str`, defaults to `"mean"`): Scale of a series in a window: `"mean"` absolute value in the history,
            `"standard"` deviation about the mean (without differencing also the location), or `"none"`, 1.
        missing_indicators (`bool`, defaults to `False`): Whether the encoder is told which values are missing.
        freq (`str`, *optional*): Frequency of the series as in pandas; None for series without a clock.
        season_length (`int`, defaults to 1): Times in a season; the calendar of series without a clock.
        series_names (`list[str]`, *optional*): Names of the series.
        encoder_type (`str`, defaults to `"lstm"`): Key of [`ENCODERS`]: `"lstm"` or `"transformer"`.
        encoder_layers, encoder_width (`int`, defaults to 2 and 64): Its size.
        encoder_dropout (`float`, defaults to 0.1): Its dropout.
        denoiser_type (`str`, defaults to `"wavenet"`): Key of [`DENOISERS`]: `"wavenet"` or `"unet"`.
        denoiser_layers, denoiser_channels, denoiser_width (`int`, defaults to 8, 8 and 64): Its size.

    Attributes (buffers):
        typical_scale: Scale of each series in the training data, `(d,)`: for windows in which it hardly varies.
    """

    typical_scale: Tensor

    @register_to_config
    def __init__(
        self,
        num_series: int,
        prediction_length: int,
        context_length: int,
        num_train_timesteps: int,
        lags: list[int],
        num_time_features: int,
        differencing: int = 0,
        scaling: str = "mean",
        missing_indicators: bool = False,
        freq: str | None = None,
        season_length: int = 1,
        series_names: list[str] | None = None,
        encoder_type: str = "lstm",
        encoder_layers: int = 2,
        encoder_width: int = 64,
        encoder_dropout: float = 0.1,
        denoiser_type: str = "wavenet",
        denoiser_layers: int = 8,
        denoiser_channels: int = 8,
        denoiser_width: int = 64,
    ):
        super().__init__()
        positive = {"num_series": num_series, "prediction_length": prediction_length, "context_length": context_length}
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not lags or any(lag < 1 for lag in lags) or differencing < 0:
            raise ValueError(
                f"`lags` must be positive and at least one, and `differencing` not negative, got {lags} and"
                f" {differencing}."
            )
        choices = {
            "scaling": (scaling, SCALINGS),
            "encoder_type": (encoder_type, ENCODERS),
            "denoiser_type": (denoiser_type, DENOISERS),
        }
        for name, (key, allowed) in choices.items():
            if key not in allowed:
                raise ValueError(f"`{name}` must be one of {tuple(allowed)}, got {key!r}.")
        self.register_to_config(lags=sorted(set(lags)), series_names=series_names and list(series_names))
        self.num_known = len(self.lags) * (2 if missing_indicators else 1)
        inputs = num_series * self.num_known + num_series + num_time_features
        length = context_length + prediction_length
        self.encoder = ENCODERS[encoder_type](inputs, encoder_width, encoder_layers, encoder_dropout, length)
        self.denoiser = DENOISERS[denoiser_type](
            num_series,
            encoder_width,
            self.num_known,
            num_train_timesteps,
            denoiser_layers,
            denoiser_channels,
            denoiser_width,
        )
        self.register_buffer("typical_scale", torch.ones(num_series))

    @property
    def lags(self) -> list[int]:
        """Times back at which values are read."""
        return self.config["lags"]

    @property
    def reach(self) -> int:
        """Times before the one that is predicted that its inputs know of."""
        return max(*self.lags, self.config["differencing"])

    @property
    def history_length(self) -> int:
        """Times that a forecast needs to know of."""
        return self.config["context_length"] + self.reach

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        condition: Tensor | None = None,
        inputs: Tensor | None = None,
        return_dict: bool = True,
    ) -> MLPModelOutput | tuple[Tensor]:
        """Predict from noisy `sample`.

        Args:
            sample (`Tensor`): `(n, d)` in the model's units.
            timestep (`Tensor`): Training steps, one or `(n,)`.
            condition (`Tensor`, *optional*): What is known of the past, `(n, condition_size)`, see [`encode`]; or
            inputs (`Tensor`, *optional*): what it reads, `(batch, length, features)`, n = batch * length: see
                [`inputs`].
            return_dict (`bool`, defaults to `True`): Whether to return a [`MLPModelOutput`] or a tuple.
        """
        if (condition is None) == (inputs is None):
            raise ValueError("Pass exactly one of `condition` and `inputs`.")
        if condition is None:
            assert inputs is not None
            condition = self.encode(inputs)[0].flatten(0, 1)
        if sample.shape != (len(condition), self.config["num_series"]):
            raise ValueError(
                f"`sample` must have shape {(len(condition), self.config['num_series'])}, got {tuple(sample.shape)}."
            )
        hidden, known = condition.tensor_split([self.config["encoder_width"]], dim=1)
        output = self.denoiser(sample, timestep, hidden, known.unflatten(1, (self.num_known, -1)))
        return MLPModelOutput(sample=output) if return_dict else (output,)

    # Units ----------------------------------------------------------------------------------------------------------

    def scale(self, values: Tensor) -> Scale:
        """Units of a window, by its first `history_length` values: `(batch, >= history_length, d)`, NaN where missing.

        They are a tenth of the typical ones at least, and those where nothing is known of a series.
        """
        differencing, scaling = self.config["differencing"], self.config["scaling"]
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
        typical = self.typical_scale.to(scale)
        return Scale(location, torch.where(scale.isnan(), typical, scale.maximum(LEAST_SCALE * typical)))

    def locations(self, values: Tensor, units: Scale) -> Tensor:
        """Location of each time from the `reach`-th on, `(batch, length, d)`, for values `(batch, reach + length, d)`.

        For differences where the value before is missing it is missing too.
        """
        length, differencing = values.shape[1] - self.reach, self.config["differencing"]
        if not differencing:
            return units.location.expand(-1, length, -1)
        return values[:, self.reach - differencing : self.reach - differencing + length]

    def inputs(self, values: Tensor, calendar: Tensor, units: Scale, locations: Tensor) -> Tensor:
        """What the encoder reads at each time from the `reach`-th on: `(batch, length, features)`.

        Args:
            values: `(batch, >= reach + length - 1, d)`, NaN where missing; the last one need not be known.
            calendar: Features of these times, `(batch, length, num_time_features)`.
            units, locations: See [`scale`] and [`locations`].
        """
        length = calendar.shape[1]
        lagged = torch.stack([values[:, self.reach - lag : self.reach - lag + length] for lag in self.lags], dim=2)
        lagged = ((lagged - locations[:, :, None]) / units.scale[:, :, None]).flatten(2)
        parts = [lagged.nan_to_num().clamp(-MOST_UNITS, MOST_UNITS)]
        if self.config["missing_indicators"]:
            parts.append(lagged.isnan().to(lagged.dtype))
        size = (units.scale / self.typical_scale.to(units.scale)).log().expand(-1, length, -1)
        return torch.cat([*parts, size, calendar.to(lagged.dtype)], dim=2)

    def windows(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `(batch, length, features)` and $z_t$ `(batch, length, d)`, NaN where missing, of whole windows.

        Jumps of more than ten units count as ten.

        Args:
            values: `(batch, reach + length, d)`, NaN where missing; length is that of context and prediction.
            calendar: `(batch, reach + length, num_time_features)`.
        """
        units = self.scale(values)
        locations = self.locations(values, units)
        inputs = self.inputs(values, calendar[:, self.reach :], units, locations)
        return inputs, ((values[:, self.reach :] - locations) / units.scale).clamp(-MOST_UNITS, MOST_UNITS)

    def encode(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Conditions of the denoiser, `(batch, length, condition_size)`, of inputs that follow those of a state.

        Also returns the new state. A condition is a hidden vector and the lagged values.
        """
        hidden, state = self.encoder(inputs, state)
        return torch.cat([hidden, inputs[..., : self.num_known * self.config["num_series"]]], dim=-1), state
