"""Training: configuration, Algorithm 1 over Accelerate, and the report of a run."""

from .config import TrainingConfig
from .loop import Trainer, TrainingResult, train


__all__ = ["Trainer", "TrainingConfig", "TrainingResult", "train"]
