r"""Two-dimensional distributions, sampled from a `torch.Generator`.

`spiral-8y` and `checkerboard-6x` are those of the VSDM paper, with the constants of its published program;
`spiral-8y-turned` is the former turned by 30 degrees.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", section 7.2.
    Tong et al. (2024), "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport": the
        scales of `8gaussians-wide` and `moons-wide`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor


def _uniform(n: int, generator: Generator | None, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _around(centers: Tensor, std: float, generator: Generator | None) -> Tensor:
    return centers + std * torch.randn(centers.shape, generator=generator)


def spiral(n: int, generator: Generator | None = None) -> Tensor:
    r"""$r = \theta + \pi$ with $\theta = 3 \pi \sqrt{U} - \pi/2$, noise 0.25, all times 0.4."""
    theta = 3 * math.pi * _uniform(n, generator).sqrt() - math.pi / 2
    arm = (theta + math.pi)[:, None] * torch.stack([theta.cos(), theta.sin()], dim=1)
    return 0.4 * _around(arm, 0.25, generator)


def checkerboard(n: int, generator: Generator | None = None) -> Tensor:
    r"""Uniform on the cells of $[-2 \pi, 2 \pi]^2$ where $\sin x \sin y \le 0$."""
    column = torch.randint(0, 4, (n,), generator=generator)
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + (column + 1) % 2
    cell = torch.stack([column, row], dim=1) - 2
    return math.pi * (cell + torch.rand(n, 2, generator=generator))


def eight_gaussians(n: int, generator: Generator | None = None, radius: float = 2.5, std: float = 0.18) -> Tensor:
    """Eight modes on a circle, each with this standard deviation."""
    angle = torch.randint(0, 8, (n,), generator=generator) * (math.pi / 4)
    return _around(radius * torch.stack([angle.cos(), angle.sin()], dim=1), std, generator)


def moons(n: int, generator: Generator | None = None) -> Tensor:
    """Two interleaved half circles of radius 2, noise 0.14, centred."""
    return _around(2 * _half_circles(n, generator), 0.14, generator)


def _half_circles(n: int, generator: Generator | None) -> Tensor:
    """Of radius 1, about their centre."""
    angle = math.pi * _uniform(n, generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], dim=1)


def moons_wide(n: int, generator: Generator | None = None) -> Tensor:
    """Half circles of radius 3, noise 0.6, about (0.5, -0.25)."""
    return 3 * _around(_half_circles(n, generator), 0.2, generator) + torch.tensor([0.5, -0.25])


def swissroll(n: int, generator: Generator | None = None) -> Tensor:
    r"""$r = \theta / 5$ with $\theta$ uniform on $[1.5 \pi, 4.5 \pi]$, noise 0.1."""
    theta = _uniform(n, generator, 1.5 * math.pi, 4.5 * math.pi)
    return _around((theta / 5)[:, None] * torch.stack([theta.cos(), theta.sin()], dim=1), 0.1, generator)


def gaussian(n: int, generator: Generator | None = None) -> Tensor:
    """Mean (-8, 2) and covariance [[1, 1], [1, 5]], the data of the paper's Gaussian bridge (section 7.1)."""
    factor = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    return torch.randn(n, 2, generator=generator) @ factor.T + torch.tensor([-8.0, 2.0])


def _stretched(toy: Callable[[int, Generator | None], Tensor], *factors: float) -> Callable:
    return lambda n, generator=None: toy(n, generator) * torch.tensor(factors)


def rotation(degrees: float) -> Tensor:
    """The matrix that turns the plane's vectors counterclockwise, `(2, 2)`."""
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _turned(toy: Callable[[int, Generator | None], Tensor], degrees: float) -> Callable:
    return lambda n, generator=None: toy(n, generator) @ rotation(degrees).T


def _shifted(toy: Callable[[int, Generator | None], Tensor], *by: float) -> Callable:
    return lambda n, generator=None: toy(n, generator) + torch.tensor(by)


TOYS: dict[str, Callable[[int, Generator | None], Tensor]] = {
    "spiral": spiral,
    "spiral-8y": _stretched(spiral, 1.0, 8.0),
    "spiral-8y-turned": _turned(_stretched(spiral, 1.0, 8.0), 30),
    "checkerboard": checkerboard,
    "checkerboard-6x": _stretched(checkerboard, 6.0, 1.0),
    "8gaussians": eight_gaussians,
    "8gaussians-wide": partial(eight_gaussians, radius=5.0, std=math.sqrt(0.1)),
    "moons": moons,
    "moons-wide": moons_wide,
    "swissroll": swissroll,
    "gaussian": gaussian,
    "gaussian-centered": _shifted(gaussian, 8.0, -2.0),
}


def sample_toy(name: str, n: int, generator: Generator | None = None) -> Tensor:
    """Draw `n` points of a toy distribution, shape `(n, 2)` in float32.

    Args:
        name (`str`): Key of [`TOYS`].
        n (`int`): Number of points, at least 1.
        generator (`torch.Generator`, *optional*): On the CPU.
    """
    if name not in TOYS:
        raise ValueError(f"`name` must be one of the toy data sets {tuple(TOYS)}, got {name!r}.")
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return TOYS[name](n, generator)
