"""Train a probabilistic forecaster of many series, a conditional variational Schrödinger diffusion model.

    accelerate launch training/train_forecaster.py --dataset_name exchange_rate_nips --prediction_length 30 \
        --differencing 1 --output_dir outputs/exchange

The output folder holds the pipeline, `metrics.json` with scores on the last windows, which it is not trained on,
`forecast.png`, `drift.png` and a model card; with `--push_to_hub` so does a repository on the Hub.
"""

from diffusers_vsdm.command_line import train
from diffusers_vsdm.trainer.forecast import ForecastConfig, ForecastTrainer
from diffusers_vsdm.trainer.forecast_report import write_forecast_report


if __name__ == "__main__":
    train(ForecastConfig, ForecastTrainer, write_forecast_report, __doc__)
