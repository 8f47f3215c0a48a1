"""Networks that know classes: the last of their class embeddings says that a sample has none.

One network then has both scores, that of a class and that of all data.

References:
    Ho and Salimans (2022), "Classifier-Free Diffusion Guidance".
"""

from typing import Any

import torch
from torch import Tensor


def num_classes(network: Any) -> int | None:
    """How many classes a network knows, besides the one that stands for none; None if it knows of no classes."""
    embeddings = network.config.get("num_class_embeds")
    return None if embeddings is None else embeddings - 1


def class_condition(network: Any, sample: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """What a network must be told of the classes of its samples, as keyword arguments of the call.

    Args:
        network: The network.
        sample: Its samples, `(batch, *event_shape)`.
        labels: Their classes, `(batch,)` whole numbers. Defaults to no class.

    Returns:
        `class_labels`, `(batch,)`; nothing for a network that knows of no classes.
    """
    classes = num_classes(network)
    if classes is None:
        return {}
    return {"class_labels": torch.full((len(sample),), classes, device=sample.device) if labels is None else labels}
