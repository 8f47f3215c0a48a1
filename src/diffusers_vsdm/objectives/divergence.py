r"""Divergences of vector fields: exact, or by Hutchinson's estimator $E[z^T (\partial f / \partial x) z]$.

References:
    Hutchinson (1990), "A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines".
    Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models".
"""

import contextlib
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


PROBES = ("exact", "gaussian", "rademacher")
MOST_EXACT = 256  # dimensions: an exact divergence takes a backward pass for each


def draw_probe(like: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor | None:
    r"""Random directions $z$ with $E[z z^T] = I$ for Hutchinson's estimator, or None for the exact divergence.

    Args:
        like: Samples `(batch, *event_shape)`, for shape, device and type.
        kind: `"exact"`, `"gaussian"`, or `"rademacher"` (signs; of smaller variance).
        generator: Of the randomness.

    Raises:
        ValueError: The kind is not known, or the dimension is too large for an exact divergence.
    """
    if kind not in PROBES:
        raise ValueError(f"`divergence` must be one of {PROBES}, got {kind!r}.")
    if kind == "exact":
        if (d := like[0].numel()) > MOST_EXACT:
            raise ValueError(
                f"`divergence` 'exact' takes a backward pass for each dimension, here {d}, and is for at most"
                f" {MOST_EXACT}: use 'rademacher'."
            )
        return None
    noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise if kind == "gaussian" else noise.sign()


def divergence(
    function: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """A vector field and its divergence.

    Args:
        function: From `(batch, *event_shape)` to the same shape, each sample on its own.
        x: Where.
        probe: Of [`draw_probe`]; None for the exact divergence.
        create_graph: Whether both may be differentiated, to train with them.

    Returns:
        The values `(batch, *event_shape)`, and the divergences `(batch,)`.
    """
    # only the plain kernel of attention can be differentiated twice
    attention = sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext()
    with torch.enable_grad(), attention:
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        value = function(x)

        def along(direction: Tensor, last: bool) -> Tensor:
            keep = create_graph or not last
            (gradient,) = torch.autograd.grad(value, x, direction, retain_graph=keep, create_graph=create_graph)
            return (gradient * direction).flatten(1).sum(1)

        if probe is not None:
            total = along(probe, last=True)
        else:
            axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
            parts = [along(axis.expand(x.shape), last=i == len(axes) - 1) for i, axis in enumerate(axes)]
            total = torch.stack(parts).sum(0)
    return (value, total) if create_graph else (value.detach(), total)
