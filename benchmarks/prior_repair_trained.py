"""The same as `benchmarks.prior_repair`, with a small network that was trained on CIFAR-10 at 32x32 in minutes.

    python -m benchmarks.prior_repair_trained --data FOLDER     # a folder with CIFAR-10 as on the Hub

The model is a stock DDPM pipeline with Stable Diffusion's table and noise prediction, made at random and trained by
`training/train_vsdm.py` with lambda 1. It is then sampled from N(0, I) and from the prior of `fit_moments`. Writes
`benchmarks/results/prior_repair_trained.json` and a picture to `docs/prior_repair_trained.png`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from diffusers_vsdm import VSDMScheduler
from diffusers_vsdm.data.images import load_images
from diffusers_vsdm.models import build_model
from diffusers_vsdm.trainer.report import versions

from .prior_repair import SAMPLER, SEEDS, TABLE, measure
from .tables import RESULTS, ROOT


RESOLUTION, STEPS, SAMPLES, SHOWN = 32, 4000, 500, 16
SAMPLING_STEPS = 25
FLAGS = {
    "resolution": RESOLUTION,
    "max_train_steps": STEPS,
    "train_batch_size": 32,
    "learning_rate": 1e-3,
    "baseline": "sgm",
    "prior_type": "conditional",
    "num_eval_samples": 0,
}


def train(data: str, folder: Path) -> UNet2DModel:
    """The network of a stock pipeline, trained as a user would."""
    torch.manual_seed(0)
    stock = DDPMPipeline(build_model("tiny", (3, RESOLUTION, RESOLUTION), 1000), DDPMScheduler(**TABLE))
    stock.save_pretrained(folder / "untrained")
    source = {"train_data_dir" if Path(data).is_dir() else "dataset_name": data}
    flags = FLAGS | source | {"pretrained_model_name_or_path": folder / "untrained", "output_dir": folder / "trained"}
    command = [sys.executable, str(ROOT / "training" / "train_vsdm.py"), *(f"--{k}={v}" for k, v in flags.items())]
    with open(folder / "log.txt", "w") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise RuntimeError((folder / "log.txt").read_text()[-3000:])
    return UNet2DModel.from_pretrained(folder / "trained", subfolder="unet")


@torch.no_grad()
def sample(network: UNet2DModel, scheduler: VSDMScheduler, seed: int) -> Tensor:
    """Samples in the scale of the data, clipped to its range at the end as pipelines do."""
    scheduler.set_timesteps(SAMPLING_STEPS)
    shape = (SAMPLES, 3, RESOLUTION, RESOLUTION)
    x = scheduler.sample_prior(shape, generator=torch.Generator().manual_seed(seed))
    for k in scheduler.timesteps:
        x = scheduler.step(network(x, k).sample, k, x).prev_sample
    return x.clamp(-1, 1)


def main() -> None:
    """Train, sample from both priors, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    arguments = parser.parse_args()
    data = load_images(arguments.data, resolution=RESOLUTION)
    images = torch.cat([data.__getitems__(list(range(i, i + 1000))) for i in range(0, 10_000, 1000)])
    with tempfile.TemporaryDirectory() as folder:
        network = train(arguments.data, Path(folder))
    fitted = VSDMScheduler.from_config(DDPMScheduler(**TABLE).config, **SAMPLER)
    plain = VSDMScheduler.from_config(fitted.config)
    fitted.fit_moments(images)
    runs: list[dict[str, Any]] = []
    rows = []
    for name, scheduler in (("N(0, I)", plain), ("marginal per frequency (fit_moments)", fitted)):
        for seed in SEEDS:
            samples = sample(network, scheduler, seed)
            runs.append({"name": name, "seed": seed, "metrics": measure(samples, images)})
            print(runs[-1], flush=True)
        rows.append(torch.cat(list(samples[:SHOWN]), dim=2))
    rows.append(torch.cat(list(images[:SHOWN]), dim=2))
    pixels = ((torch.cat(rows, dim=1) / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(
        ROOT / "docs" / "prior_repair_trained.png"
    )
    record = {
        "command": "python -m benchmarks.prior_repair_trained",
        "versions": versions(),
        "configuration": TABLE | SAMPLER | FLAGS | {"samples": SAMPLES, "sampling_steps": SAMPLING_STEPS},
        "runs": runs,
    }
    (RESULTS / "prior_repair_trained.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
