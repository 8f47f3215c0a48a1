"""`training/evaluate.py` without its command line, and how likely data are under a model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import sample_toy
from ..data.images import as_bytes
from ..likelihood import bits_per_dimension
from ..metrics.fidelity import LEAST, FeatureStatistics, InceptionFeatures
from ..objectives import Estimate
from ..pipelines import BridgePipeline, VSDMPipeline
from ..schedulers import VSDMScheduler
from .config import DataConfig, setting
from .fidelity import (
    PRECISIONS,
    SMALL_BATCH,
    FidelityReport,
    SamplingRun,
    measure_fidelity,
    reference_features,
    shape_name,
)
from .pictures import EVALUATION_SEED, picture_fidelity
from .processes import process_state
from .setup import build_images


VALUES_PER_BATCH = 1 << 18


@dataclass
class EvaluationConfig(DataConfig):
    """Settings of `training/evaluate.py`."""

    pretrained_model_name_or_path: str = setting("", "The pipeline: a folder, or a repository of the Hub.")
    output_dir: str = setting("", "Folder for `metrics.json`, and for samples and pictures.")
    seed: int = setting(0, "Seed of choices, dequantisation, estimates and samples.")
    batch_size: int = setting(0, "Samples at once; 0 for some 260,000 numbers.")

    likelihood: bool = setting(False, "Measure the log-likelihood of data, and its bound under the SDE.")
    num_samples: int = setting(1000, "Data samples for the likelihood, drawn without repetition.")
    num_times: int = setting(8, "Network calls of the bound for each sample.")
    divergence: str = setting("", "exact, rademacher or gaussian; by default exact in up to 256 dimensions.")
    rtol: float = setting(1e-5, "Relative tolerance of the adaptive solver.")
    atol: float = setting(1e-5, "Absolute tolerance of the adaptive solver.")

    fidelity: bool = setting(False, "Sample images and measure FID, and with data KID, precision and recall.")
    runs: list[str] = field(
        default_factory=lambda: ["heun@35"],
        metadata={"help": "Ways to sample, solver[:order][/time_grid]@evaluations: heun@35 dpmsolver++:3/karras@10."},
    )
    num_images: int = setting(50_000, "Images to sample by each of them.")
    statistics: str = setting("", "File of the data's features' mean and covariance, .npz; by default of the data.")
    num_reference_images: int = setting(10_000, "Images of the data to compare with, drawn without repetition.")
    save_statistics: str = setting("", "Write such a file, of these images.")
    feature_weights: str = setting("", "Weights of FID's Inception network; by default torch-fidelity downloads them.")
    guidance_scale: float = setting(1.0, "Classifier-free guidance of networks that know classes, which take turns.")
    mixed_precision: str = setting("no", "Precision of the network in sampling.", PRECISIONS)

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            ValueError: A setting is missing or out of its range.
        """
        has_data = bool(self.dataset_name or self.train_data_dir)
        if not self.pretrained_model_name_or_path:
            raise ValueError("`pretrained_model_name_or_path` is missing: name a folder or a repository.")
        if not self.likelihood and not self.fidelity:
            raise ValueError("There is nothing to evaluate: pass --likelihood or --fidelity.")
        if not has_data and (self.likelihood or not self.statistics or self.save_statistics):
            raise ValueError("`dataset_name` or `train_data_dir` is missing: name the data to evaluate on.")
        if self.fidelity and self.is_toy:
            raise ValueError(f"FID is for images, and `dataset_name` {self.dataset_name!r} is a toy.")
        if self.fidelity and not self.output_dir:
            raise ValueError("`output_dir` is missing: samples are kept there, so that an interrupted run can go on.")
        for name, least in {"num_samples": 2, "num_images": LEAST, "num_reference_images": LEAST}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("num_times", "rtol", "atol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"`mixed_precision` must be one of {tuple(PRECISIONS)}, got {self.mixed_precision!r}.")
        for run in self.runs:
            SamplingRun.parse(run)


def likelihood_data(config: DataConfig, dataset: Any, number: int, seed: int) -> Tensor:
    """Data to measure a likelihood on.

    Args:
        config: What the data are.
        dataset: The data set; None for fresh points of a toy.
        number: How many, at most.
        seed: Of the choice.

    Returns:
        `(number, *event_shape)`: vectors in data units, or images of type `torch.uint8`.
    """
    if dataset is None:
        return sample_toy(config.dataset_name, number, torch.Generator().manual_seed(EVALUATION_SEED + 4 + seed))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:number]
    samples = dataset.__getitems__(chosen.tolist())
    return samples if samples.ndim == 2 else as_bytes(samples)


def measure_likelihood(
    pipeline: VSDMPipeline,
    samples: Tensor,
    batch_size: int = 0,
    num_times: int = 8,
    seed: int = 0,
    divergence: str | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> dict[str, Any]:
    """Means over data, in nats for a sample, with standard errors.

    Args:
        pipeline: The model.
        samples: As for [`VSDMPipeline.log_likelihood`].
        batch_size: Samples at once; 0 for some 260,000 numbers.
        num_times: Network calls of the bound for each sample; a bridge calls both networks at all training times.
        seed: Of dequantisation and the estimates.
        divergence, rtol, atol: As for [`VSDMPipeline.log_likelihood`].

    Returns:
        `nll` of the probability flow and `bound` of the SDE, the bound's three parts, the network calls for a sample
        of either, and the number of samples; for images also bits per dimension of both.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = batch_size or max(1, VALUES_PER_BATCH // samples[0].numel())
    parts: dict[str, list[Tensor]] = {}
    calls = 0
    for batch in samples.split(batch_size):
        found = pipeline.log_likelihood(batch, divergence, generator, rtol, atol)
        bound = pipeline.likelihood_bound(batch, num_times, generator)
        calls += found.num_function_evaluations * len(batch)
        for name, value in {"nll": -found.value, "bound": bound.total, **vars(bound)}.items():
            parts.setdefault(name, []).append(value)
    record: dict[str, Any] = {
        "num_samples": len(samples),
        "nll_evaluations": round(calls / len(samples)),
        "bound_evaluations": 2 * len(pipeline.process()) if isinstance(pipeline, BridgePipeline) else num_times,
    }
    for name, values in parts.items():
        estimate = Estimate.of(torch.cat(values))
        record |= {name: estimate.value, f"{name}_standard_error": estimate.standard_error}
    if samples.dtype == torch.uint8:
        d = samples[0].numel()
        for name in ("nll", "bound"):
            for suffix in ("", "_standard_error"):
                nats = torch.tensor(record[name + suffix])
                record[f"{name}_bits_per_dimension{suffix}"] = float(-bits_per_dimension(nats, d))
    return record


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a saved pipeline; returns the record, which is empty on other processes than the main one.

    Raises:
        ValueError: The data cannot be had, or do not fit the model or the statistics.
        OSError: The pipeline cannot be loaded.
        ImportError: A library that this needs is not installed.
        FloatingPointError: Samples are not finite.
    """
    state = process_state()
    source = config.pretrained_model_name_or_path
    is_bridge = VSDMPipeline.load_config(source).get("_class_name") == BridgePipeline.__name__
    pipeline = (BridgePipeline if is_bridge else VSDMPipeline).from_pretrained(source)
    if not isinstance(pipeline.scheduler, VSDMScheduler):
        pipeline.scheduler = VSDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.to(state.device)
    has_images = bool(config.dataset_name or config.train_data_dir) and not config.is_toy
    dataset = build_images(config) if has_images else None
    record: dict[str, Any] = {}
    if config.fidelity:
        report = evaluate_fidelity(config, pipeline, dataset)
        if state.is_main_process:
            record |= {"num_images": report.num_samples, "runs": report.rows, "table": report.table()}
    if config.likelihood and state.is_main_process:  # for which no other waits
        samples = likelihood_data(config, dataset, config.num_samples, config.seed)
        estimate = (config.divergence or None, config.rtol, config.atol)
        record |= measure_likelihood(pipeline, samples, config.batch_size, config.num_times, config.seed, *estimate)
    return record


def evaluate_fidelity(config: EvaluationConfig, pipeline: VSDMPipeline, dataset: Any) -> FidelityReport:
    """The part of [`evaluate`] that samples images.

    Args:
        config: The settings.
        pipeline: The model, on its device.
        dataset: Images to compare with; None if there are only statistics.
    """
    shape = pipeline.event_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"FID is for images of 1 or 3 channels, not for samples of shape {shape}.")
    if dataset is not None and dataset.event_shape != shape:
        raise ValueError(
            f"The data are {dataset.event_shape}, the model's images {shape}: set `resolution`, `channels`."
        )
    if dataset is not None and len(dataset) < LEAST:
        raise ValueError(f"The data are {len(dataset)} images: at least {LEAST} are needed to compare with.")
    features, folder = InceptionFeatures(config.feature_weights or None, pipeline.unet.device), Path(config.output_dir)
    about = {"network": features.digest, "shape": shape_name(shape)}
    reference = statistics = None
    if dataset is not None:
        number = config.num_reference_images
        reference = reference_features(dataset, number, config.seed, folder / "reference", features)
        statistics = FeatureStatistics.of(reference, **about)
        if config.save_statistics and process_state().is_main_process:
            statistics.save(config.save_statistics)
    if config.statistics:
        statistics = FeatureStatistics.load(config.statistics)
        statistics.check(reference, **about)
    report = measure_fidelity(
        pipeline,
        [SamplingRun.parse(run) for run in config.runs],
        config.num_images,
        config.batch_size or SMALL_BATCH,
        config.seed,
        folder,
        features,
        statistics,
        reference,
        config.mixed_precision,
        config.guidance_scale,
    )
    if process_state().is_main_process:
        picture_fidelity(report.rows, "fid", report.fid_name).save(folder / "fid.png")
    return report
