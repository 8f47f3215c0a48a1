"""Score networks for what Diffusers has none for."""

from .mlp import MLPModel, MLPModelOutput


__all__ = ["MLPModel", "MLPModelOutput"]
