"""The trainer of images and of vectors."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import Tensor

from ..metrics.fidelity import FeatureStatistics, InceptionFeatures
from ..models.classes import class_condition, num_classes
from ..pipelines import VSDMPipeline
from ..schedulers import VSDMScheduler
from .algorithm import BaseTrainer, TrainingResult
from .config import TrainingConfig
from .evaluation import likelihood_data, measure_likelihood
from .fidelity import SmallFid
from .pictures import picture_samples
from .setup import (
    LabelledDataset,
    VectorDataset,
    build_data,
    build_network,
    mirrored,
    moment_batches,
    on_device,
)


logger = logging.get_logger(__name__)


class Trainer(BaseTrainer):
    """One run of Algorithm 1 on images, or on vectors.

    Args:
        config ([`TrainingConfig`]): The settings.
        data (`Tensor`, *optional*): Vectors `(n, d)` to train on, instead of the data that the settings name.

    Raises:
        ValueError: The data cannot be had or does not fit (see [`setup`]), or the machine lacks the precision.
    """

    config: TrainingConfig

    def __init__(self, config: TrainingConfig, data: Tensor | None = None):
        super().__init__(config, data)
        self.likelihood_data: Tensor | None = None
        if config.likelihood_samples:
            source = None if data is None and config.is_toy else self.dataset
            self.likelihood_data = likelihood_data(config, source, config.likelihood_samples, config.seed)
        self.fid = self._small_fid()

    @property
    def _pretrained(self) -> str:
        return self.config.pretrained_model_name_or_path

    def _load(self, data: Tensor | None) -> Any:
        config = self.config
        dataset = build_data(config) if data is None else VectorDataset(data)
        if config.class_conditional and dataset.num_classes is None:
            raise ValueError("`class_conditional` is for images with labels, not for vectors: leave it out.")
        return dataset if config.dataloader_num_workers else on_device(dataset, self.accelerator.device)

    def _moment_batches(self) -> Iterable[Tensor]:
        return moment_batches(self.dataset, self.config.seed, self.config.dataloader_num_workers)

    def _build_network(self) -> ModelMixin:
        return build_network(self.config, self.dataset.event_shape, len(self.scheduler), self.dataset.num_classes)

    def _pipeline(self, network: torch.nn.Module, scheduler: VSDMScheduler) -> VSDMPipeline:
        return VSDMPipeline(network, scheduler, self.normalizer)

    def _examples_dataset(self) -> Any:
        return LabelledDataset(self.dataset) if self.config.class_conditional else self.dataset

    def _num_examples(self, batch: Any) -> int:
        return len(batch[0] if self.config.class_conditional else batch)

    def _examples(self, batch: Any, uniform: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Images, mirrored at random, and their classes, of which some are left out; or vectors."""
        sample, labels = batch if self.config.class_conditional else (batch, None)
        if self.config.random_flip:
            sample = mirrored(sample, uniform())
        if labels is not None:
            labels = labels.masked_fill(uniform() < self.config.label_dropout, num_classes(self.network))
        return sample, class_condition(self.network, sample, labels), None

    def _stage_condition(self, network: torch.nn.Module, x: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
        """No class: the drift carries all data to the prior, whatever their classes."""
        return class_condition(network, x)

    def _finish(self, result: TrainingResult) -> TrainingResult:
        result.pipeline.unet.to(memory_format=torch.contiguous_format)
        return replace(result, likelihood=self._likelihood(result.pipeline))

    def _likelihood(self, pipeline: VSDMPipeline) -> dict[str, Any] | None:
        if self.likelihood_data is None or not self.accelerator.is_main_process:
            return None
        data = self.likelihood_data
        return self._measured("likelihood", lambda: measure_likelihood(pipeline, data, seed=self.config.seed))

    @staticmethod
    def _measured(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return measure()
        except FloatingPointError as error:  # no reason to lose the model
            logger.warning("The %s was not measured: %s", name, error)
            return None

    def _validate(self) -> None:
        """A picture of samples of the model as it is, a file and an image in the log, and its likelihoods."""
        with self._averaged_network() as network:
            if self.accelerator.is_main_process:
                # the drift comes along, copied
                self._picture(self._pipeline(network, VSDMScheduler.from_config(self.scheduler.config)))
            self.accelerator.wait_for_everyone()

    def _picture(self, pipeline: VSDMPipeline) -> None:
        config = self.config
        steps = config.ddpm_num_inference_steps or None
        number = config.num_eval_samples if config.is_toy else config.eval_batch_size
        picture = picture_samples(pipeline, number, steps)
        likelihood = self._likelihood(pipeline) or {}
        found = self._measured("FID", lambda: self.fid(pipeline, steps) if self.fid else {}) or {}
        found |= {f"likelihood/{k}": v for k, v in likelihood.items() if not k.endswith("_evaluations")}
        self.accelerator.log(found, step=self.step)
        file = self.folder / "validation" / f"step-{self.step}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        if found:
            file.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        for tracker in self.accelerator.trackers:
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(picture)[None]}, step=self.step, **form)

    def _small_fid(self) -> SmallFid | None:
        config = self.config
        if not config.validation_images or not self.accelerator.is_main_process:
            return None
        features = InceptionFeatures(config.feature_weights or None, self.accelerator.device)
        statistics = FeatureStatistics.load(config.statistics) if config.statistics else None
        return SmallFid(features, statistics, self.dataset, config.validation_images)


def train(config: TrainingConfig, data: Tensor | None = None) -> TrainingResult:
    """Train a model as `config` says, on `data` if given: [`Trainer.train`]."""
    return Trainer(config, data).train()
