"""Sampling and training on another device than the CPU."""

import pytest
from torch.utils import backend_registration

from .processes import ROOT, run_python


RUN = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="devices in Python need a later PyTorch",
)
@pytest.mark.parametrize("what_users_do", ["sampling", "training"])
def test_what_users_do_on_another_device(what_users_do):
    """In a process of its own: PyTorch is told of a device before the first backward pass, and never forgets it."""
    outcome = run_python(["-c", RUN, f"tests/{what_users_do}_on_second_device.py"], ROOT)
    assert not outcome.returncode, outcome.stdout
