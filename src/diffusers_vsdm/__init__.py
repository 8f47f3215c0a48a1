"""Variational Schrödinger diffusion models for Hugging Face Diffusers."""

from .drift import AdaptiveDiagonalDrift
from .models import MLPModel
from .normalizer import DataNormalizer
from .schedulers import VSDMScheduler
from .stochastic_approximation import StochasticApproximation


__version__ = "0.1.0"
