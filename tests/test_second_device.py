"""Sampling and training on another device than the CPU."""

import pytest
from torch.utils import backend_registration

from .processes import ROOT, run_python


RUN = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/on_second_device.py']))"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="devices in Python need a later PyTorch",
)
def test_what_users_do_on_another_device():
    """In a process of its own: PyTorch is told of a device before the first backward pass, and never forgets it."""
    outcome = run_python(["-c", RUN], ROOT)
    assert not outcome.returncode, outcome.stdout
