"""Train a variational Schrödinger diffusion model.

    accelerate launch training/train_vsdm.py --dataset_name spiral-8y --standardize --output_dir outputs/spiral-8y

The output folder holds the pipeline, `metrics.json`, `samples.png`, `drift.png` and a model card; with `--push_to_hub`
so does a repository on the Hub.
"""

from diffusers_vsdm.command_line import train
from diffusers_vsdm.trainer import Trainer, TrainingConfig
from diffusers_vsdm.trainer.report import write_report


if __name__ == "__main__":
    train(TrainingConfig, Trainer, lambda trainer, result: write_report(trainer.config, result), __doc__)
