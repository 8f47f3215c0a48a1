"""Short runs on a part of CIFAR-10, in pixels and in frequencies: trained, killed, resumed, loaded and sampled.

    python -m benchmarks.cifar10 --data FOLDER     # a folder with the data set as on the Hub, or `uoft-cs/cifar10`

Every run goes through `accelerate launch training/train_vsdm.py`, once without interruption and once with SIGKILL at
random moments, resumed from the latest checkpoint each time; the files that both leave are compared. Writes
`benchmarks/results/cifar10.json`. The pictures of the docs are those of `benchmarks.model_cards`, the same runs.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .tables import RESULTS, ROOT


STEPS, KILLS = 2000, 10
FLAGS = {
    "resolution": 16,
    "max_train_samples": 10_000,
    "random_flip": True,
    "max_train_steps": STEPS,
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "sa_trajectories": 32,
    "checkpointing_steps": 50,
    "checkpoints_total_limit": 2,
}
RUNS = {"identity": "pixels", "dct": "frequencies"}


def start(data: str, basis: str, folder: Path, resume: bool) -> subprocess.Popen:
    """Launch training in a process group of its own."""
    source = {"train_data_dir" if Path(data).is_dir() else "dataset_name": data}
    flags = FLAGS | source | {"basis": basis, "output_dir": folder}
    if resume:
        flags["resume_from_checkpoint"] = "latest"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    command += [str(ROOT / "training" / "train_vsdm.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def checkpoints(folder: Path) -> set[str]:
    """Names of the checkpoints that are there."""
    return {path.name for path in folder.glob("checkpoint-*")}


def digests(folder: Path) -> dict[str, str]:
    """Of the files that a user loads, and of lambda after every stage."""
    files = [*folder.glob("unet/*"), *folder.glob("scheduler/**/*.*"), *folder.glob("normalizer/*")]
    found = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    numbers = json.dumps([metrics["lambda_per_stage"], metrics["final_loss"]])
    return found | {"lambda and loss": hashlib.sha256(numbers.encode()).hexdigest()}


def run(data: str, basis: str, folder: Path) -> dict[str, Any]:
    """One basis: the run that nothing disturbs, and the one that is killed."""
    whole, killed = folder / f"{basis}-whole", folder / f"{basis}-killed"
    if start(data, basis, whole, resume=False).wait():
        raise RuntimeError((folder / f"{basis}-whole.log").read_text()[-2000:])
    record = json.loads((whole / "metrics.json").read_text())
    seconds = record["metrics"]["seconds"]

    generator, kills = random.Random(basis), []
    for _ in range(KILLS):
        process = start(data, basis, killed, resume=bool(checkpoints(killed)))
        before = checkpoints(killed)
        while checkpoints(killed) == before:  # so that every life gets somewhere
            if process.poll() is not None:
                raise RuntimeError((folder / f"{basis}-killed.log").read_text()[-2000:])
            time.sleep(0.01)
        time.sleep(generator.uniform(0, seconds / KILLS / 2))
        kills.append(max(int(name.split("-")[1]) for name in checkpoints(killed)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if start(data, basis, killed, resume=True).wait():
        raise RuntimeError((folder / f"{basis}-killed.log").read_text()[-2000:])

    import torch

    from diffusers_vsdm import VSDMPipeline

    pipeline = VSDMPipeline.from_pretrained(killed)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(4, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    metrics = record["metrics"] | {
        "killed_after_checkpoint": kills,
        "resumed_is_identical": digests(whole) == digests(killed),
        "samples_shape": list(images.shape),
    }
    return {"name": RUNS[basis], "seed": record["config"]["seed"], "metrics": metrics, "config": record["config"]}


def main() -> None:
    """Both bases at once, each on its share of the cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    data = parser.parse_args().data
    threads = max(1, (os.cpu_count() or 1) // len(RUNS))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from diffusers_vsdm.trainer.report import versions

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda basis: run(data, basis, Path(folder)), RUNS))
    record = {
        "command": "python -m benchmarks.cifar10",
        "versions": versions(),
        "machine": {"cores": os.cpu_count(), "threads": threads},
        "runs": runs,
    }
    (RESULTS / "cifar10.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
