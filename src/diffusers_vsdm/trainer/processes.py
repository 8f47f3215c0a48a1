"""The place of a process among all that run a script."""

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Accelerate's state, which is made at the first call. Processes on CPUs find each other only if it is told."""
    return PartialState(cpu=not torch.accelerator.is_available())
