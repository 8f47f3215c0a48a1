"""Standardising data: an optional component of a pipeline, so that a swap of schedulers changes no units."""

from collections.abc import Iterable

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .statistics import Moments, Statistics


class DataNormalizer(Statistics):
    """Affine map between data and the units in which a model was trained: `(x - mean) / std`.

    The statistics stay float32 when a pipeline is cast to half precision.

    Args:
        shape (`tuple[int, ...]`): Shape of the statistics, broadcastable to one sample: `(d,)` or `(C, 1, 1)`.

    Attributes (buffers):
        mean, std: Statistics in data units, shape `shape`; 0 and 1 at first.
    """

    mean: Tensor
    std: Tensor

    @register_to_config
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_to_config(shape=list(shape))
        self.register_buffer("mean", torch.zeros(tuple(shape)))
        self.register_buffer("std", torch.ones(tuple(shape)))

    @classmethod
    def from_data(cls, data: Tensor | Iterable[Tensor], shape: tuple[int, ...] | None = None) -> "DataNormalizer":
        """Fit to samples of shape `(n, *event_shape)`.

        Args:
            data (`Tensor` or batches of them): At least two samples.
            shape (`tuple[int, ...]`, *optional*): Shape of the statistics; dimensions of size 1 are pooled. Defaults
                to the shape of one sample.

        Raises:
            ValueError: Fewer than two samples, values that are not finite, or a dimension that does not vary.
        """
        moments = Moments(data)
        event_shape = tuple(moments.mean.shape)
        shape = event_shape if shape is None else tuple(shape)
        if len(shape) != len(event_shape) or any(
            n not in (1, size) for n, size in zip(shape, event_shape, strict=True)
        ):
            raise ValueError(f"`shape` {shape} does not broadcast to samples of shape {event_shape}.")
        mean, variance = moments.pooled(shape)
        if not (variance > 0).all():
            raise ValueError("`data` has a dimension that does not vary: drop it, or pool it with others by `shape`.")
        normalizer = cls(shape)
        normalizer.mean.copy_(mean)
        normalizer.std.copy_(variance.sqrt())
        return normalizer

    def normalize(self, data: Tensor) -> Tensor:
        """Data units to model units, shape `(n, *event_shape)`; computed in float32 at least, of `data`'s type."""
        return ((data - self.mean) / self.std).to(data.dtype if data.is_floating_point() else self.mean.dtype)

    def denormalize(self, samples: Tensor) -> Tensor:
        """Model units to data units; half precision samples come back in float32."""
        return samples * self.std + self.mean
