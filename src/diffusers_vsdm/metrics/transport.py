r"""How straight the paths are, and how far the samples are from the data.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", Eq. 38.
    Peyré, Cuturi (2019), "Computational Optimal Transport", sections 2 and 3.
"""

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


def wasserstein2(samples: Tensor, reference: Tensor, standardize: bool = False) -> float:
    """Exact 2-Wasserstein distance between two empirical laws, by POT's network simplex.

    Args:
        samples, reference (`Tensor`): Points `(n, d)` and `(m, d)`; a few thousand take seconds.
        standardize (`bool`, defaults to `False`): Divide every axis by the reference's standard deviation first.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError("The Wasserstein distance needs POT: pip install diffusers-vsdm[transport]") from error
    x, y = (points.cpu().double().flatten(1) for points in (samples, reference))
    if x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"`samples` {tuple(samples.shape)} and `reference` {tuple(reference.shape)} do not match.")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("`samples` or `reference` holds NaN or infinite values.")
    if standardize:
        scale = y.std(0)
        x, y = x / scale, y / scale
    cost = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return float(max(ot.emd2([], [], cost, numItermax=10_000_000), 0.0) ** 0.5)
