"""Training: configuration, Algorithm 1 over Accelerate, and the report of a run."""

from .config import TrainingConfig
from .loop import TrainingResult, train


__all__ = ["TrainingConfig", "TrainingResult", "train"]
