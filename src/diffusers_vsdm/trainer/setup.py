"""The parts of a run, made from its settings: data, network, process."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import TOYS, sample_toy
from ..data.images import DecodedImages, ImageDataset, load_images
from ..drift import AdaptiveDiagonalDrift
from ..models import build_model
from ..models.classes import num_classes as known_classes
from ..models.presets import check_sides
from ..schedulers import VSDMScheduler
from .config import BROWNIAN, EXPLODING, POWER_LAW, DataConfig, RunConfig, TrainingConfig
from .processes import process_state


# enough for the moments of images: their means and variances are known to 1%
MOMENT_SAMPLES = 10_000
# in a batch of them: 8 MB in float64. glibc keeps freed blocks of up to this size from then on, instead of giving the
# memory of activations back after every step, and training on a CPU has fewer page faults
MOMENT_VALUES = 1 << 20
FUSED = ("cpu", "cuda", "xpu")  # where AdamW is one kernel
T = TypeVar("T")


def build_accelerator(config: RunConfig) -> Accelerator:
    """Precision, as the settings say or else Accelerate's own, devices, processes and trackers of a run.

    Raises:
        ValueError: The machine lacks the precision, or Accelerate is told to split networks.
        ImportError: The package to log with is not installed.
    """
    process_state()
    if config.logger not in ("none", *map(str, get_available_trackers())):
        raise ImportError(
            f"`logger` {config.logger!r} is not installed: pip install {config.logger}, or choose another."
        )
    folder = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision or None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.logger == "none" else config.logger,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / config.logging_dir)),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # Accelerate would go on in float32, silently
        raise ValueError(f"`mixed_precision` 'fp16' needs a GPU, not {accelerator.device.type!r}: use 'bf16' or 'no'.")
    kind = accelerator.distributed_type
    old_fsdp = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if old_fsdp or kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Accelerate is configured for {kind.value}{', version 1' * old_fsdp}, whose parts of a network cannot be"
            " averaged here: use data parallelism (`--multi_gpu`), or FSDP with `--fsdp_version 2`."
        )
    return accelerator


def build_optimizer(
    config: RunConfig, network: torch.nn.Module, learning_rate: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with the settings' own numbers."""
    return torch.optim.AdamW(
        network.parameters(),
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type in FUSED,
    )


def seed_dropout(seed: int, device: torch.device) -> None:
    """The randomness that networks draw by themselves, from another stream than generators of this seed."""
    seed = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    # on a CPU without the detour over GPUs that are not there, about 3% of a toy's step
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)


class VectorDataset(Dataset):
    """A tensor `(n, d)` that is read a batch at a time.

    Raises:
        ValueError: It holds NaN or infinite values.
    """

    num_classes: int | None = None

    def __init__(self, data: Tensor):
        if not torch.isfinite(data).all():
            raise ValueError("The data set holds NaN or infinite values: remove them.")
        self.data = data
        self.event_shape = tuple(data.shape[1:])

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Rows, `(len(indices), d)`."""
        return self.data[indices]


class LabelledDataset(Dataset):
    """A data set of images, read a batch at a time together with their classes."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images `(n, C, H, W)` and classes `(n,)`."""
        return self.images.__getitems__(indices), self.images.labels[indices]


def build_data(config: TrainingConfig) -> Any:
    """The training set, with `event_shape`, `num_classes` and batched access.

    Raises:
        ValueError: It cannot be had, or is damaged.
    """
    if config.is_toy:
        generator = torch.Generator().manual_seed(config.seed)
        return VectorDataset(sample_toy(config.dataset_name, config.num_train_samples, generator))
    return build_images(
        config, config.max_train_samples or None, config.label_column if config.class_conditional else None
    )


def build_images(config: DataConfig, max_samples: int | None = None, label_column: str | None = None) -> Any:
    """A data set of images, or its first ones, with `event_shape` and batched access.

    Raises:
        ValueError: It cannot be had, or is damaged.
    """
    try:
        return load_images(
            config.train_data_dir or config.dataset_name,
            config.image_column or None,
            config.channels,
            config.resolution or None,
            max_samples,
            config.dataset_config_name or None,
            config.cache_dir or None,
            config.split,
            label_column,
        )
    except ValueError as error:
        raise ValueError(f"{error} (The toys are {', '.join(TOYS)}.)") from error


def on_device(dataset: Any, device: torch.device) -> Any:
    """Images decoded once and kept on a GPU, if they fit into a quarter of its free memory; other data as they are."""
    if device.type != "cuda" or not isinstance(dataset, ImageDataset):
        return dataset
    free, _ = torch.cuda.mem_get_info(device)
    if len(dataset) * math.prod(dataset.event_shape) > free / 4:
        return dataset
    return DecodedImages(dataset, device)


def moment_batches(data: Any, seed: int, num_workers: int) -> Iterable[Tensor]:
    """Batches to fit moments to: all of a vector data set, a random part of many images."""
    if isinstance(data, VectorDataset):
        return (data.data,)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:MOMENT_SAMPLES]
    batch_size = max(1, MOMENT_VALUES // math.prod(data.event_shape))
    return DataLoader(data, batch_size, sampler=chosen.tolist(), num_workers=num_workers, collate_fn=as_it_is)


def mirrored(images: Tensor, uniform: Tensor) -> Tensor:
    """Images `(n, C, H, W)`, those for whose number in [0, 1) it says so the other way round."""
    turned = (uniform < 0.5).reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(turned, images.flip(-1), images)


def as_it_is(batch: Any) -> Any:
    """For data sets that make a batch themselves."""
    return batch


def load_part(load: Callable[..., T], name: str, part: str) -> T:
    """A part of a pretrained pipeline, from its own folder or, as the first DDPM pipelines have it, from the root."""
    try:
        return load(name, subfolder=part)
    except OSError:
        return load(name)


def build_network(
    config: TrainingConfig, event_shape: tuple[int, ...], num_times: int, num_classes: int | None = None
) -> ModelMixin:
    """The network of a run: pretrained, from a configuration file, or a preset; for `num_classes` if there are any.

    Args:
        config: The settings.
        event_shape: Of the data.
        num_times: Training times N.
        num_classes: Of the data, or None.

    Raises:
        ValueError: The network does not fit the data.
    """
    network: ModelMixin
    if config.pretrained_model_name_or_path:
        network = load_part(UNet2DModel.from_pretrained, config.pretrained_model_name_or_path, "unet")
    elif config.model_config_name_or_path:
        settings = UNet2DModel.load_config(config.model_config_name_or_path)
        classes = {} if num_classes is None else {"num_class_embeds": num_classes + 1}
        network = UNet2DModel.from_config(settings, **classes)
    else:
        network = build_model(
            config.model, event_shape, config.ddpm_num_steps, config.model_width, config.model_num_blocks, num_classes
        )
    if isinstance(network, UNet2DModel):
        _check_network(network, event_shape, num_times, num_classes)
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
    return network


def _check_network(
    network: UNet2DModel, event_shape: tuple[int, ...], num_times: int, num_classes: int | None
) -> None:
    config = network.config
    size, channels = config["sample_size"], {config["in_channels"], config["out_channels"]}
    sides = event_shape[1:] if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if channels != {event_shape[0]} or sides != event_shape[1:]:
        raise ValueError(
            f"The network has `in_channels` {config['in_channels']}, `out_channels` {config['out_channels']} and"
            f" `sample_size` {size}, the data are {event_shape}: set `channels` and `resolution`, or take another one."
        )
    embedding, known_times = config["time_embedding_type"], config["num_train_timesteps"]
    if embedding == "fourier" or (embedding == "learned" and (known_times or 0) < num_times):
        raise ValueError(
            f"The network has `time_embedding_type` {embedding!r} and `num_train_timesteps` {known_times}, the run has"
            f" the training times 0 to {num_times - 1}: use 'positional', or 'learned' for as many times."
        )
    if config["class_embed_type"] is not None:
        raise ValueError(
            f"The network has `class_embed_type` {config['class_embed_type']!r}: only None is for labels."
        )
    check_sides(event_shape[1:], config["block_out_channels"], "The network")
    if known_classes(network) != num_classes:
        raise ValueError(
            f"The network has `num_class_embeds` {config['num_class_embeds']}, the run"
            f" {num_classes or 'no'} classes: there must be one more embedding than classes with `class_conditional`,"
            " and none without. Start from another network."
        )


def build_scheduler(
    config: RunConfig, event_shape: tuple[int, ...], batches: Iterable[Tensor], pretrained: str = ""
) -> tuple[VSDMScheduler, AdaptiveDiagonalDrift]:
    r"""The process of a run, and its drift as it starts, which knows the moments of `batches` (model units).

    The table of betas is that of a `pretrained` pipeline, if there is one. The drift starts at $\lambda = 1$. With a
    table of sigmas it is 0 for the baseline, and starts at $1 / g_T$ where it is learned, since steps on its logarithm
    cannot leave 0.
    """
    settings: dict[str, Any] = {"prior_type": config.prior_type, "solver": config.solver}
    is_exploding = config.ddpm_beta_schedule in (EXPLODING, BROWNIAN) and not pretrained
    if not is_exploding:
        settings |= {"clip_sample": len(event_shape) == 3 and not config.standardize, "timestep_spacing": "trailing"}
    prediction_type = config.prediction_type
    if prediction_type == "auto":
        # neither epsilon nor v is a well-scaled task where sigma is large
        prediction_type = "edm" if is_exploding else "v_prediction" if len(event_shape) == 1 else "epsilon"
    settings["prediction_type"] = prediction_type
    if pretrained:
        stored = load_part(VSDMScheduler.load_config, pretrained, "scheduler")
        if stored.get("drift_sha256") is not None:
            raise ValueError(
                "`pretrained_model_name_or_path` has a learned drift, and its network belongs to that. Start from a"
                " model without one, or resume the run that made it."
            )
        del settings["prediction_type"]
        settings.pop("clip_sample", None)
        scheduler = VSDMScheduler.from_config(stored, **settings)
    elif config.ddpm_beta_schedule == POWER_LAW:
        scheduler = VSDMScheduler.from_power_law(
            config.beta_min, config.beta_max, config.beta_power, config.ddpm_num_steps, **settings
        )
    elif config.ddpm_beta_schedule == BROWNIAN:
        scheduler = VSDMScheduler.from_brownian(config.sigma_max, config.ddpm_num_steps, **settings)
    elif is_exploding:
        scheduler = VSDMScheduler.from_variance_exploding(
            config.sigma_min, config.sigma_max, num_train_timesteps=config.ddpm_num_steps, **settings
        )
    else:
        scheduler = VSDMScheduler(
            num_train_timesteps=config.ddpm_num_steps,
            beta_schedule=config.ddpm_beta_schedule,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            **settings,
        )
    lambda_shape = {
        "all": (1,) * len(event_shape),
        "channel": event_shape[:1] + (1,) * (len(event_shape) - 1),
        "element": event_shape,
    }[config.lambda_per]
    num_times = len(scheduler) if config.lambda_varies else None
    drift = AdaptiveDiagonalDrift(event_shape, lambda_shape, basis=config.basis, num_times=num_times)
    drift.fit_moments(batches)
    if scheduler.is_variance_exploding:
        drift.set_lambda(0.0 if config.baseline == "sgm" else 1 / scheduler.integrated_beta[-1])
    scheduler.set_drift(drift)
    return scheduler, drift
