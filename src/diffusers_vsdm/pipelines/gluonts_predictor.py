"""A forecasting pipeline behind GluonTS's interface."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from gluonts.dataset import Dataset
from gluonts.model.forecast import SampleForecast
from gluonts.model.predictor import Predictor

from ..data.frames import STAND_IN, numbered


class VSDMPredictor(Predictor):
    """Made by [`VSDMForecastPipeline.predictor`]; entries have a `target` of shape `(d, time)`.

    Args:
        pipeline ([`VSDMForecastPipeline`]): The pipeline.
        num_inference_steps (`int`, *optional*), batch_size (`int`, *optional*): As in its call.
        seed (`int`, *optional*): Of the paths.
    """

    def __init__(self, pipeline: Any, num_inference_steps: int | None, seed: int | None, batch_size: int | None):
        config = pipeline.model.config
        super().__init__(prediction_length=config["prediction_length"], lead_time=0)
        self.pipeline, self.num_inference_steps = pipeline, num_inference_steps
        self.seed, self.batch_size = seed, batch_size

    def predict(self, dataset: Dataset, num_samples: int = 100, **kwargs: Any) -> Iterator[SampleForecast]:
        """Forecasts of all entries, sampled together: `samples` of shape `(num_samples, prediction_length, d)`."""
        entries = list(dataset)
        if not entries:
            return
        generator = None if self.seed is None else torch.Generator(self.pipeline.device).manual_seed(self.seed)
        output = self.pipeline(
            [self._history(entry) for entry in entries],
            num_samples,
            num_inference_steps=self.num_inference_steps,
            generator=generator,
            batch_size=self.batch_size,
        )
        length = self.prediction_length
        for entry, samples in zip(entries, output.samples, strict=True):
            start = entry["start"] + np.shape(entry["target"])[-1]
            yield SampleForecast(samples=samples[:, :length], start_date=start, item_id=entry.get("item_id"))

    def _history(self, entry: Any) -> Any:
        """For a model without a clock, a frame that counts days as [`as_gluonts_entries`] does."""
        if self.pipeline.model.config["freq"] is not None:
            return entry
        values = np.asarray(entry["target"]).T
        first = (entry["start"] - pd.Period(*STAND_IN)).n if entry["start"].freqstr == STAND_IN[1] else 0
        return pd.DataFrame(values, pd.RangeIndex(first, first + len(values)), numbered("series", values.shape[1]))
