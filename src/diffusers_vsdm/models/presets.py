"""Networks by name."""

from collections.abc import Sequence
from typing import Any

from diffusers import ModelMixin, UNet2DModel

from .mlp import MLPModel


# keyword arguments of UNet2DModel, without its channels and size
UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 32,
    },
    # the 35.7M network of Ho et al. (2020) for 32x32 images
    "ddpm-cifar10": {
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "dropout": 0.1,
    },
    # DDPM++ (Song et al. 2021) as Karras et al. (2022) use it for CIFAR-10: 57.2M parameters instead of 55.7M. What
    # UNet2DModel cannot express, or does otherwise: residual sums divided by sqrt(2), the stem of 128 channels instead
    # of 256, attention on the way up in the last block of its level instead of in each, their initialization, and the
    # label of the augmentation
    "ddpmpp-cifar10": {
        "block_out_channels": (256, 256, 256),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "layers_per_block": 4,
        "time_embedding_dim": 512,
        "freq_shift": 1,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "dropout": 0.13,
    },
}


def build_model(
    preset: str,
    event_shape: tuple[int, ...],
    num_train_timesteps: int,
    width: int = 128,
    num_blocks: int = 3,
    num_classes: int | None = None,
) -> ModelMixin:
    """A fresh network for samples of shape `(d,)` or `(C, H, W)`.

    Args:
        preset (`str`): `"mlp"` for vectors, a key of [`UNETS`] for images, or `"auto"`.
        event_shape (`tuple[int, ...]`): Shape of one sample.
        num_train_timesteps (`int`): Training times N, for the MLP's embedding.
        width, num_blocks (`int`): Size of the MLP.
        num_classes (`int`, *optional*): Classes that a network for images is to know, besides an embedding that says
            that there is none.

    Raises:
        ValueError: The preset is not for such samples or for classes, or the images' sides cannot be halved often
            enough.
    """
    is_image = len(event_shape) == 3
    name = {"auto": "tiny" if is_image else "mlp"}.get(preset, preset)
    if (name in UNETS) != is_image:
        kind = "images" if is_image else "vectors"
        raise ValueError(f"`model` {name!r} is not for {kind} of shape {event_shape}: use 'auto'.")
    if not is_image and num_classes is not None:
        raise ValueError(f"`model` 'mlp' knows no classes, got `num_classes` {num_classes}: leave it out.")
    if not is_image:
        return MLPModel(event_shape[0], num_train_timesteps, width, num_blocks)
    channels, *sides = event_shape
    check_sides(sides, UNETS[name]["block_out_channels"], f"`model` {name!r}")
    size = sides[0] if sides[0] == sides[1] else tuple(sides)
    classes = {} if num_classes is None else {"num_class_embeds": num_classes + 1}
    return UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **UNETS[name], **classes)


def check_sides(sides: Sequence[int], block_out_channels: Sequence[int], name: str) -> None:
    """Refuse images whose sides a UNet2DModel of these blocks cannot halve between each of them and the next.

    Raises:
        ValueError: A side is not divisible.
    """
    divisor = 2 ** (len(block_out_channels) - 1)
    if any(side % divisor for side in sides):
        raise ValueError(f"{name} needs sides that {divisor} divides, got {list(sides)}: give a `resolution`.")
