"""Train the pipelines in `model_cards/`, those of the commands in the docs.

    python -m benchmarks.model_cards --data FOLDER     # a folder with CIFAR-10 as on the Hub, or `uoft-cs/cifar10`
    python -m benchmarks.model_cards checkerboard-6x   # one of them

Each folder is what `training/train_vsdm.py` leaves, by the command that its card names. Models of images are too large
to ship: they stay in `outputs/`, and `model_cards/` has their cards and pictures. Every run has a process and one
thread of its own.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from .cifar10 import FLAGS
from .tables import ROOT
from .workers import run_all


CIFAR10 = "uoft-cs/cifar10"
CARD = ("README.md", "metrics.json", "samples.png", "drift.png")
IMAGES = {name: FLAGS[name] for name in FLAGS if "checkpoint" not in name} | {"dataset_name": CIFAR10}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "cifar10-pixels": IMAGES,
    "cifar10-frequencies": IMAGES | {"basis": "dct"},
    "spiral-8y": {"dataset_name": "spiral-8y", "standardize": True},
    "spiral-8y-sgm": {"dataset_name": "spiral-8y", "standardize": True, "baseline": "sgm"},
    "checkerboard-6x": {"dataset_name": "checkerboard-6x", "standardize": True},
}


def make(job: tuple[str, str]) -> None:
    """Train one; runs in its own process."""
    name, data = job
    from diffusers_vsdm.trainer import TrainingConfig, train
    from diffusers_vsdm.trainer.report import write_report

    settings = CONFIGURATIONS[name] | {"overwrite_output_dir": True}
    place = "model_cards" if TrainingConfig(**settings).is_toy else "outputs"
    settings["output_dir"] = f"{place}/{name}"
    config = TrainingConfig(**settings)
    folder = config.prepare_output_dir()
    is_copy = not config.is_toy and Path(data).is_dir()
    result = train(TrainingConfig(**settings | {"train_data_dir": data, "dataset_name": ""}) if is_copy else config)
    record = write_report(config, result)
    if not config.is_toy:
        (ROOT / "model_cards" / name).mkdir(exist_ok=True)
        for file in CARD:
            shutil.copy(folder / file, ROOT / "model_cards" / name / file)
    print(name, record["metrics"], flush=True)


def main() -> None:
    """Train those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*CONFIGURATIONS, []], default=[])
    parser.add_argument("--data", default=CIFAR10)
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve()) if Path(arguments.data).is_dir() else arguments.data
    os.chdir(ROOT)
    jobs = [(name, data) for name in arguments.names or CONFIGURATIONS]
    list(run_all(make, jobs))


if __name__ == "__main__":
    main()
