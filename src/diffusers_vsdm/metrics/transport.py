r"""How straight the paths are, and how far the samples are from the data.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", Eq. 38.
    Peyré, Cuturi (2019), "Computational Optimal Transport", sections 2 and 3.
    Bonneel, Rabin, Peyré, Pfister (2015), "Sliced and Radon Wasserstein Barycenters of Measures".
    Tong et al. (2024), "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport":
        path energy and its normalised form.
"""

from typing import Any

import torch
from torch import Tensor


def straightness(trajectory: Tensor, step: float) -> Tensor:
    r"""Mean of $|d^2 x / dt^2|$ along paths: Eq. 38, per coordinate. 0 for straight paths at constant speed.

    Args:
        trajectory (`Tensor`): `(num_times, num_paths, *event_shape)`: paths on a uniform grid of three times or more.
        step (`float`): Spacing of the grid in units of t in [0, 1].

    Returns:
        `Tensor` of shape `event_shape`: the mean over paths and over the `num_times - 2` second differences, in data
        units per unit of time squared.
    """
    if trajectory.ndim < 3 or len(trajectory) < 3:
        raise ValueError(
            f"`trajectory` must have shape (num_times >= 3, num_paths, *event_shape), got {tuple(trajectory.shape)}."
        )
    if not step > 0:
        raise ValueError(f"`step` must be positive, got {step}.")
    return torch.diff(trajectory.cpu().double(), n=2, dim=0).abs().mean((0, 1)) / step**2


def path_energy(trajectory: Tensor, step: float | None = None) -> float:
    r"""$\int_0^1 E|dx/dt|^2 dt$ along paths: at least the squared 2-Wasserstein distance between their ends.

    Args:
        trajectory (`Tensor`): `(num_times, num_paths, *event_shape)`: paths on a uniform grid of two times or more.
        step (`float`, *optional*): Spacing of the grid in units of t in [0, 1]. By default every path is passed at a
            constant speed of its own, on any grid: the mean square of their lengths, which is the least that they can
            have in any clock, and so compares processes with clocks of their own.
    """
    if trajectory.ndim < 3 or len(trajectory) < 2:
        raise ValueError(
            f"`trajectory` must have shape (num_times >= 2, num_paths, *event_shape), got {tuple(trajectory.shape)}."
        )
    if step is not None and not step > 0:
        raise ValueError(f"`step` must be positive, got {step}.")
    lengths = torch.diff(trajectory.cpu().double(), dim=0).flatten(2).norm(dim=2)
    energies = lengths.sum(0).square() if step is None else lengths.square().sum(0) / step
    return float(energies.mean())


def normalized_path_energy(trajectory: Tensor, step: float | None = None) -> float:
    r"""$|E - W_2^2| / W_2^2$ with E the [`path_energy`] and $W_2$ between both ends of the paths.

    0 where the paths are an optimal transport at constant speed (Tong et al. 2024). Arguments as there.
    """
    squared = wasserstein2(trajectory[0], trajectory[-1]) ** 2
    return abs(path_energy(trajectory, step) - squared) / squared


def wasserstein2(samples: Tensor, reference: Tensor, standardize: bool = False) -> float:
    """Exact 2-Wasserstein distance between two empirical laws, by POT's network simplex.

    Args:
        samples, reference (`Tensor`): Points `(n, d)` and `(m, d)`; a few thousand take seconds.
        standardize (`bool`, defaults to `False`): Divide every axis by the reference's standard deviation first.
    """
    ot, (x, y) = _transport(), _points(samples, reference, standardize)
    cost = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return float(max(ot.emd2([], [], cost, numItermax=10_000_000), 0.0) ** 0.5)


def sliced_wasserstein1(
    samples: Tensor, reference: Tensor, standardize: bool = False, num_projections: int = 1000, seed: int = 0
) -> float:
    """Sliced 1-Wasserstein distance (Bonneel et al. 2015): the mean over directions drawn from a sphere.

    Args:
        samples, reference, standardize: As in [`wasserstein2`]; any dimension.
        num_projections (`int`, defaults to 1000): Number of directions.
        seed (`int`, defaults to 0): Of the directions.
    """
    ot, (x, y) = _transport(), _points(samples, reference, standardize)
    return float(
        ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), n_projections=num_projections, p=1, seed=seed).item()
    )


def pmf_distance(samples: Tensor, reference: Tensor, bins: int = 100) -> float:
    """Root mean squared difference of two histograms in the plane, as the VSDM authors' program reports it.

    The bins cover 1.025 times the limits of the reference; samples outside count in the nearest one. Two samples of
    one law of n points each differ by about `sqrt(2 / n) / bins`: compare only at equal numbers.

    Args:
        samples, reference (`Tensor`): Points `(n, 2)` and `(m, 2)`.
        bins (`int`, defaults to 100): Of each axis.
    """
    x, y = _points(samples, reference, standardize=False)
    if x.shape[1] != 2:
        raise ValueError(f"`samples` must be points in the plane, got {tuple(samples.shape)}.")
    low, high = 1.025 * y.amin(0), 1.025 * y.amax(0)

    def mass(points: Tensor) -> Tensor:
        cell = ((points - low) / (high - low) * bins).long().clamp(0, bins - 1)
        return torch.bincount(cell[:, 0] * bins + cell[:, 1], minlength=bins**2).double() / len(points)

    return float((mass(x) - mass(y)).square().mean().sqrt())


def _transport() -> Any:
    """POT.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError("Distances between laws need POT: pip install diffusers-vsdm[transport]") from error
    return ot


def _points(samples: Tensor, reference: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    x, y = (points.detach().cpu().double().flatten(1) for points in (samples, reference))
    if x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"`samples` {tuple(samples.shape)} and `reference` {tuple(reference.shape)} do not match.")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("`samples` or `reference` holds NaN or infinite values.")
    scale = y.std(0) if standardize else torch.ones(y.shape[1])
    return x / scale, y / scale
