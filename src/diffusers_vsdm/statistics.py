"""What is measured and not trained: moments of data, and modules that keep them exact when a pipeline is cast.

References:
    Chan, Golub, LeVeque (1983), "Algorithms for Computing the Sample Variance", The American Statistician.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor


class Moments:
    """Mean and variance of samples that come in batches, in float64 and without cancellation (Chan et al. 1983).

    Args:
        batches: Tensors `(n, *event_shape)`, or one such tensor; they hold two samples or more altogether. Arrays will
            do.
        full: Whether to keep all products along the first dimension of a sample, for [`covariance`].

    Attributes:
        count: Number of samples.
        mean: Shape `event_shape`.
        squares: Sum of squared deviations from the mean, shape `event_shape`; if `full`, of their products
            `(d, *event_shape)`, where d is the size of the first dimension.

    Raises:
        ValueError: Fewer than two samples, or values that are not finite.
        TypeError: A batch is no tensor.
    """

    def __init__(self, batches: Tensor | Iterable[Tensor], full: bool = False):
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())
        for batch in as_batches(batches):
            batch = batch.detach().to("cpu", torch.float64)
            mean = batch.mean(0)
            deviations = batch - mean
            if full:
                squares = torch.einsum("nc...,nd...->cd...", deviations, deviations)
            else:
                squares = deviations.square_().sum(0)
            if not torch.isfinite(squares).all():
                raise ValueError("The data hold NaN or infinite values: remove them.")
            delta, total = mean - self.mean, self.count + len(batch)
            shift = delta[:, None] * delta if full else delta.square()
            self.mean = self.mean + delta * (len(batch) / total)
            self.squares = self.squares + squares + shift * (self.count * len(batch) / total)
            self.count = total
        if self.count < 2:
            raise ValueError(f"Two samples or more are needed, got {self.count}.")

    def covariance(self) -> Tensor:
        """Unbiased covariance along the first dimension, `(d, *event_shape)`; for `full` moments."""
        return self.squares / (self.count - 1)

    def pooled(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance with dimensions pooled where `shape` is 1, each of that shape."""
        dims = [dim for dim, (n, size) in enumerate(zip(shape, self.mean.shape, strict=True)) if n != size]
        mean = self.mean.mean(dims, keepdim=True) if dims else self.mean
        squares = self.squares + self.count * (self.mean - mean).square()
        squares = squares.sum(dims, keepdim=True) if dims else squares
        return mean, squares / (self.count * (self.mean.numel() // mean.numel()) - 1)


def as_batches(data: Tensor | np.ndarray | Iterable[Tensor | np.ndarray]) -> Iterator[Tensor]:
    """Tensors `(n, *event_shape)` of what is one, an array, or several of these.

    Raises:
        TypeError: One of several is something else.
        ValueError: A batch has no first dimension of samples.
    """
    for batch in (data,) if isinstance(data, (Tensor, np.ndarray)) else data:
        if not isinstance(batch, (Tensor, np.ndarray)):
            raise TypeError(
                f"`data` must be a tensor (n, *event_shape) or batches of such, got a batch that is a"
                f" {type(batch).__name__}: pass the tensor alone."
            )
        if batch.ndim < 2:
            raise ValueError(
                f"`data` must be a tensor (n, *event_shape) or batches of such, got a batch of shape"
                f" {tuple(batch.shape)}: make one tensor of single samples by `torch.stack`."
            )
        yield torch.as_tensor(batch)


class ExactBuffers:
    """For modules whose own buffers keep their types when they are cast."""

    _buffers: dict[str, Tensor | None]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and buffer is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class Statistics(ExactBuffers, ModelMixin, ConfigMixin):
    """A module of buffers only, whose types `.to(dtype)` and `from_pretrained(dtype=...)` leave alone."""

    config_name = "config.json"

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in Diffusers, except that a `dtype` is ignored."""
        for name in ("dtype", "torch_dtype"):
            kwargs.pop(name, None)
        return super().from_pretrained(*args, **kwargs)
