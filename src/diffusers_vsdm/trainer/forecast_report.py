"""The output of a forecaster's run: pipeline, metrics.json, forecast.png, drift.png and the model card."""

from pathlib import Path
from typing import Any

from ..hub.cards import render_card
from ..hub.remote_code import write_remote_code
from .algorithm import TrainingResult
from .forecast import ForecastTrainer, evaluate_forecasts
from .report import drift_picture, training_metrics, write_record


def write_forecast_report(trainer: ForecastTrainer, result: TrainingResult) -> dict[str, Any]:
    """Write everything into `config.output_dir`; returns what `metrics.json` holds."""
    config, folder, pipeline = trainer.config, Path(trainer.config.output_dir), result.pipeline
    pipeline.save_pretrained(folder)
    metrics = training_metrics(result, pipeline.model)
    metrics["num_series"] = pipeline.model.config["num_series"]
    metrics["history_length"] = pipeline.model.history_length
    metrics["freq"] = pipeline.model.config["freq"]
    if trainer.test_windows:
        scores, figure = evaluate_forecasts(pipeline, trainer.test_windows, config)
        metrics |= scores
        if figure is not None:
            figure.savefig(folder / "forecast.png")
    drift_picture(config, result).save(folder / "drift.png")
    record = write_record(config, metrics)
    render_card(folder, record)
    write_remote_code(folder, type(pipeline).__name__)
    return record
