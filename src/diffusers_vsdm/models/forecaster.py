r"""`ForecastModel`: an encoder of the past and a denoiser of the next values of d series, in units of their own.

At each time t the values $x_t$ of all series are a vector, and the model is of $z_t = (x_t - l_t) / c$, see
[`series_units`]. The encoder reads, up to t, the values at some lags before it in the same units, which of them are
missing, the calendar, and $\log c$. The denoiser is given its hidden vector, and again the lagged values of each
series, which need not pass through so narrow a door.

References:
    Rasul et al. (2021), "Autoregressive Denoising Diffusion Models for Multivariate Probabilistic Time Series
        Forecasting".
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..statistics import ExactBuffers
from .denoisers import DENOISERS, DenoiserSizes
from .encoders import ENCODERS
from .mlp import MLPModelOutput
from .series_units import SCALINGS, SeriesUnits


class ForecastModel(ExactBuffers, ModelMixin, ConfigMixin):
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
        input_dropout (`float`, defaults to 0): Dropout of what it reads, against learning many series by heart.
        denoiser_type (`str`, defaults to `"wavenet"`): Key of [`DENOISERS`]: `"wavenet"` or `"unet"`.
        denoiser_layers, denoiser_channels, denoiser_width (`int`, defaults to 8, 8 and 64): Its size.

    Attributes (buffers):
        typical_scale: Scale of each series in the training data, `(d,)`: for windows in which it hardly varies.
    """

    typical_scale: Tensor
    _keep_in_fp32_modules = ["typical_scale"]  # of sales in millions float16 knows nothing

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
        input_dropout: float = 0.0,
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
        self.num_known = len(self.config["lags"]) * (2 if missing_indicators else 1)
        inputs = num_series * self.num_known + num_series + num_time_features
        length = context_length + prediction_length
        self.encoder = ENCODERS[encoder_type](inputs, encoder_width, encoder_layers, encoder_dropout, length)
        self.dropout = nn.Dropout(input_dropout)
        sizes = DenoiserSizes(
            num_series,
            encoder_width,
            self.num_known,
            num_train_timesteps,
            denoiser_layers,
            denoiser_channels,
            denoiser_width,
        )
        self.denoiser = DENOISERS[denoiser_type](sizes)
        self.register_buffer("typical_scale", torch.ones(num_series))

    @property
    def units(self) -> SeriesUnits:
        """What values become for this model, and back."""
        names = ("lags", "differencing", "scaling", "missing_indicators", "context_length")
        chosen = {name: self.config[name] for name in names}
        return SeriesUnits(**chosen, typical_scale=self.typical_scale.cpu().double())

    @property
    def history_length(self) -> int:
        """Times that a forecast needs to know of."""
        return self.units.history_length

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
                [`SeriesUnits.inputs`].
            return_dict (`bool`, defaults to `True`): Whether to return a [`MLPModelOutput`] or a tuple.
        """
        if condition is None and inputs is not None:
            condition = self.encode(inputs)[0].flatten(0, 1)
        elif condition is None or inputs is not None:
            raise ValueError("Pass exactly one of `condition` and `inputs`.")
        if sample.shape != (len(condition), self.config["num_series"]):
            raise ValueError(
                f"`sample` must have shape {(len(condition), self.config['num_series'])}, got {tuple(sample.shape)}."
            )
        hidden, known = condition.tensor_split([self.config["encoder_width"]], dim=1)
        output = self.denoiser(sample, timestep, hidden, known.unflatten(1, (self.num_known, -1)))
        return MLPModelOutput(sample=output) if return_dict else (output,)

    @apply_forward_hook  # for models that are kept elsewhere until they are called
    def encode(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Conditions of the denoiser, `(batch, length, condition_size)`, of inputs that follow those of a state.

        Also returns the new state. A condition is a hidden vector and the lagged values.
        """
        hidden, state = self.encoder(self.dropout(inputs), state)
        return torch.cat([hidden, inputs[..., : self.num_known * self.config["num_series"]]], dim=-1), state
