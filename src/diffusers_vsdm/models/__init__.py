"""Score networks for what Diffusers has none for, and networks by name."""

from .forecaster import ForecastModel
from .mlp import MLPModel, MLPModelOutput
from .presets import UNETS, build_model


__all__ = ["UNETS", "ForecastModel", "MLPModel", "MLPModelOutput", "build_model"]
