"""Data sets."""

from .toys import TOYS, sample_toy


__all__ = ["TOYS", "sample_toy"]
