"""Schrödinger bridges: processes with both ends given."""

from .gaussian import GaussianSchrodingerBridge
from .two_sided import TwoSidedProcess


__all__ = ["GaussianSchrodingerBridge", "TwoSidedProcess"]
