"""The law of the first sample of a run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases import Basis, in_its_precision


@dataclass(frozen=True)
class GaussianPrior:
    r"""A Gaussian of samples `(batch, *event_shape)`, whose coordinates in a basis are independent, or correlated.

    Attributes:
        mean, std: Of the coordinates; they broadcast against a sample.
        basis: The change of coordinates.
        factor: Instead of `std`, the lower triangular $L$ of a covariance $L L^T$ of vectors, `(d, d)`.
    """

    mean: Tensor
    std: Tensor
    basis: Basis
    factor: Tensor | None = None

    @in_its_precision
    def sample(self, noise: Tensor) -> Tensor:
        """A draw from standard normal `noise`."""
        white = self.basis.to_basis(noise)
        spread = self.std * white if self.factor is None else white @ self.factor.T
        return self.basis.from_basis(self.mean + spread)

    def log_prob(self, sample: Tensor) -> Tensor:
        """Log-density in nats, `(batch,)`."""
        squares = self._whiten(self.basis.to_basis(sample) - self.mean).square().flatten(1)
        return -0.5 * (squares + math.log(2 * math.pi)).sum(1) - self._log_volume(sample[0])

    def divergence_from(self, mean: Tensor, std: Tensor) -> Tensor:
        """The Kullback-Leibler divergence of $N(m, s^2)$ from this law in nats, `(batch,)`.

        Args:
            mean: Of the coordinates, `(batch, *event_shape)`.
            std: Of the independent coordinates, broadcastable to a sample.
        """
        std = std.expand(mean.shape[1:])
        if self.factor is None:
            relative = (std / self.std).square().sum()
        else:
            relative = self._whiten(std.diag()).square().sum()
        off = self._whiten(mean - self.mean).square().flatten(1).sum(1)
        return 0.5 * (off + relative - std.numel()) + self._log_volume(std) - std.log().sum()

    def _whiten(self, off: Tensor) -> Tensor:
        if self.factor is None:
            return off / self.std
        return torch.linalg.solve_triangular(self.factor, off.T, upper=False).T

    def _log_volume(self, like: Tensor) -> Tensor:
        return self.std.expand(like.shape).log().sum() if self.factor is None else self.factor.diagonal().log().sum()
