r"""Orthonormal bases in which a drift is diagonal: $D = U \mathrm{diag}(\lambda) U^T$.

In the coordinates $U^T x$ the process, its prior and every solver are elementwise, and white noise stays white.

- `identity`: the coordinates as they are, the paper's choice for images.
- `dct`: the two-dimensional cosine basis times a rotation of the channels. Image statistics differ by frequency and
  between brightness and colour, not between pixels.
- `dense`: any rotation of a vector, stored as a matrix; for low dimensions.

References:
    Ahmed, Natarajan, Rao (1974), "Discrete Cosine Transform", IEEE Transactions on Computers.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


Transform = Callable[[Any, Tensor], Tensor]


def in_its_precision(transform: Transform) -> Transform:
    """A transform that `torch.autocast`, meant for networks, does not make coarser."""

    @functools.wraps(transform)
    def wrapped(self: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return transform(self, x)

    return wrapped


class Basis(Protocol):
    """An orthonormal change of coordinates of samples `(..., *event_shape)`; shapes do not change."""

    def to_basis(self, x: Tensor) -> Tensor:
        """$U^T x$."""

    def from_basis(self, x: Tensor) -> Tensor:
        """$U x$."""


class IdentityBasis:
    """The coordinates as they are."""

    def to_basis(self, x: Tensor) -> Tensor:
        """`x`."""
        return x

    def from_basis(self, x: Tensor) -> Tensor:
        """`x`."""
        return x


@dataclass(frozen=True)
class RotatedBasis:
    """A rotation of vectors.

    Args:
        rotation (`Tensor`): Orthogonal, `(d, d)`; its rows are the new axes.
    """

    rotation: Tensor

    @in_its_precision
    def to_basis(self, x: Tensor) -> Tensor:
        """Coordinates `(..., d)` along the new axes."""
        return x @ self.rotation.mT

    @in_its_precision
    def from_basis(self, x: Tensor) -> Tensor:
        """The vector of such coordinates."""
        return x @ self.rotation


@dataclass(frozen=True)
class CosineBasis:
    """Type-II cosine transform of height and width, and a rotation of the channels.

    Args:
        rotation (`Tensor`): Orthogonal, `(C, C)`; its rows are the new channels.
        rows, columns (`Tensor`): Cosine matrices of the height and the width, [`cosine_matrix`].
    """

    rotation: Tensor
    rows: Tensor
    columns: Tensor

    @in_its_precision
    def to_basis(self, x: Tensor) -> Tensor:
        """Frequency coefficients of `(..., C, H, W)`; the lowest frequency comes first."""
        turned = (self.rotation @ x.flatten(-2)).unflatten(-1, x.shape[-2:])
        return self.rows @ turned @ self.columns.T

    @in_its_precision
    def from_basis(self, x: Tensor) -> Tensor:
        """The image of frequency coefficients `(..., C, H, W)`."""
        turned = self.rows.T @ x @ self.columns
        return (self.rotation.T @ turned.flatten(-2)).unflatten(-1, x.shape[-2:])


def cosine_matrix(n: int) -> Tensor:
    r"""The orthonormal type-II cosine transform: $\sqrt{2/n} \cos(\pi (j + 1/2) i / n)$, its first row $1/\sqrt n$.

    Returns:
        `(n, n)` in float64; row i is the i-th frequency.
    """
    i = torch.arange(n, dtype=torch.float64)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * i[:, None] * (i + 0.5) / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def principal_axes(covariance: Tensor) -> Tensor:
    """Eigenvectors of a covariance `(d, d)`, widest first, as rows."""
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1).T
    # an eigenvector has no sign of its own: let the larger part be positive
    return axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)
