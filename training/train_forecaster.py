"""Train a probabilistic forecaster of many series, a conditional variational Schrödinger diffusion model.

    accelerate launch training/train_forecaster.py --dataset_name exchange_rate_nips --prediction_length 30 \
        --differencing 1 --output_dir outputs/exchange

The output folder holds the pipeline, `metrics.json` with scores on the last windows, which it is not trained on,
`forecast.png`, `drift.png` and a model card; with `--push_to_hub` so does a repository on the Hub.
"""

import sys

from transformers import HfArgumentParser

from diffusers_vsdm.trainer.forecast import ForecastConfig, ForecastTrainer
from diffusers_vsdm.trainer.forecast_report import write_forecast_report
from diffusers_vsdm.trainer.processes import process_state
from diffusers_vsdm.trainer.pushing import push, repository_for


def main() -> None:
    """Parse the command line, train, and report on the main process."""
    state = process_state()
    try:
        (config,) = HfArgumentParser(ForecastConfig, description=__doc__).parse_args_into_dataclasses()
        if state.is_main_process:
            config.prepare_output_dir()
            repo_id = repository_for(config)
        trainer = ForecastTrainer(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train_forecaster.py: {error}")
    result = trainer.train()
    if not state.is_main_process:
        return
    metrics = write_forecast_report(trainer, result)["metrics"]
    print(
        f"\n{result.seconds:.0f} s of training, {100 * metrics['sa_share']:.1f}% of it in"
        f" stochastic approximation; everything is in {config.output_dir}/"
    )
    if repo_id is None:
        return
    try:
        print(f"It is on the Hub: {push(config, repo_id)}")
    except RuntimeError as error:
        sys.exit(f"train_forecaster.py: {error}")


if __name__ == "__main__":
    main()
