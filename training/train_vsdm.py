"""Train a variational Schrödinger diffusion model.

    accelerate launch training/train_vsdm.py --dataset_name spiral-8y --standardize --output_dir outputs/spiral-8y

The output folder holds the pipeline, `metrics.json`, `samples.png`, `drift.png` and a model card; with `--push_to_hub`
so does a repository on the Hub.
"""

import sys

from transformers import HfArgumentParser

from diffusers_vsdm.trainer import Trainer, TrainingConfig
from diffusers_vsdm.trainer.processes import process_state
from diffusers_vsdm.trainer.pushing import push, repository_for
from diffusers_vsdm.trainer.report import write_report


def main() -> None:
    """Parse the command line, train, and report on the main process."""
    state = process_state()
    try:
        (config,) = HfArgumentParser(TrainingConfig, description=__doc__).parse_args_into_dataclasses()
        if state.is_main_process:
            config.prepare_output_dir()
            repo_id = repository_for(config)
        trainer = Trainer(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train_vsdm.py: {error}")
    result = trainer.train()
    if not state.is_main_process:
        return
    metrics = write_report(trainer.config, result)["metrics"]
    print(
        f"\n{result.seconds:.0f} s of training, {100 * metrics['sa_share']:.1f}% of it in"
        f" stochastic approximation; everything is in {config.output_dir}/"
    )
    if repo_id is None:
        return
    try:
        print(f"It is on the Hub: {push(config, repo_id)}")
    except RuntimeError as error:
        sys.exit(f"train_vsdm.py: {error}")


if __name__ == "__main__":
    main()
