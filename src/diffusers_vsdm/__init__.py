"""Variational Schrödinger diffusion models for Hugging Face Diffusers.

Importing the package makes its classes known to `DiffusionPipeline.from_pretrained`.
"""

import sys

from .drift import AdaptiveDiagonalDrift
from .hub.registration import register
from .models import ForecastModel, MLPModel
from .normalizer import DataNormalizer
from .pipelines import BridgePipeline, VSDMForecastPipeline, VSDMPipeline
from .schedulers import VSDMScheduler
from .stochastic_approximation import StochasticApproximation


__version__ = "0.1.0"

__all__ = [
    "AdaptiveDiagonalDrift",
    "BridgePipeline",
    "DataNormalizer",
    "ForecastModel",
    "MLPModel",
    "StochasticApproximation",
    "VSDMForecastPipeline",
    "VSDMPipeline",
    "VSDMScheduler",
]

register(
    sys.modules[__name__],
    components=("AdaptiveDiagonalDrift", "DataNormalizer", "ForecastModel", "MLPModel", "VSDMScheduler"),
    pipelines=("BridgePipeline", "VSDMForecastPipeline", "VSDMPipeline"),
)
