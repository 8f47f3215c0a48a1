"""Schrödinger bridges: processes with both ends given."""

from .gaussian import GaussianSchrodingerBridge


__all__ = ["GaussianSchrodingerBridge"]
