"""How likely data are under a model: what training reports, and `training/evaluate.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import sample_toy
from ..likelihood import bits_per_dimension
from ..objectives import Estimate
from ..pipelines import VSDMPipeline
from ..schedulers import VSDMScheduler
from .config import DataConfig, setting
from .pictures import EVALUATION_SEED
from .setup import build_images


VALUES_PER_BATCH = 1 << 18


@dataclass
class EvaluationConfig(DataConfig):
    """Settings of `training/evaluate.py`."""

    pretrained_model_name_or_path: str = setting("", "The pipeline: a folder, or a repository of the Hub.")
    likelihood: bool = setting(False, "Measure the log-likelihood of data, and its bound under the SDE.")
    num_samples: int = setting(1000, "Data samples, drawn without repetition.")
    batch_size: int = setting(0, "Samples at once; 0 for some 260,000 numbers.")
    num_times: int = setting(8, "Network calls of the bound for each sample.")
    divergence: str = setting("", "exact, rademacher or gaussian; by default exact in up to 256 dimensions.")
    rtol: float = setting(1e-5, "Relative tolerance of the adaptive solver.")
    atol: float = setting(1e-5, "Absolute tolerance of the adaptive solver.")
    seed: int = setting(0, "Seed of the choice, of dequantisation and of the estimates.")
    output_file: str = setting("", "JSON file for the record.")

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            ValueError: A setting is missing or out of its range.
        """
        if not self.pretrained_model_name_or_path:
            raise ValueError("`pretrained_model_name_or_path` is missing: name a folder or a repository.")
        if not self.likelihood:
            raise ValueError("There is nothing to evaluate: pass --likelihood.")
        if not self.dataset_name and not self.train_data_dir:
            raise ValueError("`dataset_name` or `train_data_dir` is missing: name the data to evaluate on.")
        if self.num_samples < 2:
            raise ValueError(f"`num_samples` must be at least 2, for a standard error, got {self.num_samples}.")
        for name in ("num_times", "rtol", "atol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


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
    return samples if samples.ndim == 2 else ((samples + 1) * 127.5).round().to(torch.uint8)


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
        num_times: Network calls of the bound for each sample.
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
        "bound_evaluations": num_times,
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
    """Evaluate a saved pipeline; returns the record.

    Raises:
        ValueError: The data cannot be had, or do not fit the model.
        OSError: The pipeline cannot be loaded.
    """
    pipeline = VSDMPipeline.from_pretrained(config.pretrained_model_name_or_path)
    if not isinstance(pipeline.scheduler, VSDMScheduler):
        pipeline.scheduler = VSDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = likelihood_data(config, None if config.is_toy else build_images(config), config.num_samples, config.seed)
    return measure_likelihood(
        pipeline,
        samples,
        config.batch_size,
        config.num_times,
        config.seed,
        config.divergence or None,
        config.rtol,
        config.atol,
    )
