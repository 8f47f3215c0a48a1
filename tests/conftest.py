import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small; waiting threads only contend


@pytest.fixture
def fresh_accelerator():
    """For modules that make several trainers with settings of their own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
