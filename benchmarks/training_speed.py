"""Images per second and peak memory of training, beside Diffusers' `train_unconditional.py`.

    python -m benchmarks.training_speed --script PATH/train_unconditional.py --data FOLDER

The script is that of a Diffusers checkout; it needs torchvision. Both train the same network on the same images, at
the same time, on a core each, which they swap from one repeat to the next: what else slows the machine down slows
both. The rate is that of the steps after the first few, by the times of their log entries. The peak of memory is taken
when the script ends: a build of torch with CUDA maps in another 100 MB when the process is torn down. Writes
`benchmarks/results/training_speed.json`, where runs of a precision that is not measured again stay.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .tables import RESULTS, ROOT


STEPS, WARMUP, BATCH, RESOLUTION = 80, 10, 32, 32
REPEATS = 5
SHARED = {
    "resolution": RESOLUTION,
    "random_flip": True,
    "use_ema": True,
    "train_batch_size": BATCH,
    "eval_batch_size": 1,
    "ddpm_num_inference_steps": 2,
    "logger": "tensorboard",
}
OURS = {"max_train_steps": STEPS, "logging_steps": 10, "lr_warmup_steps": 10}
NEUTRAL = {"baseline": "sgm", "ddpm_beta_schedule": "linear", "ddpm_num_steps": 1000, "prior_type": "conditional"}
# in steps of training and trajectories as in the run of `benchmarks.cifar10`
LEARNED = {"basis": "dct", "sa_stages": 1, "sa_trajectories": 32}
THEIRS = {"center_crop": True, "num_epochs": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "lambda = 1": OURS | NEUTRAL,
    f"dct, a stage in {STEPS} steps": OURS | LEARNED,
}


# runs a script, and leaves its peak of memory, in kB, in the file named first
MEASURED = """
import pathlib, resource, runpy, sys
_, file, *sys.argv = sys.argv
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    pathlib.Path(file).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


def flags(settings: dict[str, Any]) -> list[str]:
    """As both parsers take them."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


def start(script: Path, settings: dict[str, Any], folder: Path, core: int) -> subprocess.Popen:
    """One training on one core."""
    folder.mkdir()
    command = [script, *flags(settings), f"--output_dir={folder / 'model'}"]
    whole = ["taskset", "-c", str(core), sys.executable, "-c", MEASURED, folder / "peak", *command]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(list(map(str, whole)), stdout=log, stderr=log)


def measured(process: subprocess.Popen, folder: Path) -> dict[str, float]:
    """Images per second and peak memory of a training, which is waited for."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if process.wait():
        raise RuntimeError((folder / "log.txt").read_text()[-3000:])
    times: dict[int, float] = {}
    for path in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path))
        events.Reload()
        if "loss" in events.Tags()["scalars"]:
            times |= {event.step: event.wall_time for event in events.Scalars("loss")}
    seconds = times[STEPS] - times[WARMUP]
    metrics = {
        "images_per_second": (STEPS - WARMUP) * BATCH / seconds,
        "peak_mb": int((folder / "peak").read_text()) / 1024,
    }
    report = folder / "model" / "metrics.json"
    if report.exists():
        metrics["sa_share"] = json.loads(report.read_text())["metrics"]["sa_share"]
    return metrics


def main() -> None:
    """Each variant beside the other script, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    arguments = parser.parse_args()
    import torchvision
    from datasets import load_dataset

    from diffusers_vsdm.models import build_model
    from diffusers_vsdm.trainer.report import versions

    path, runs = RESULTS / "training_speed.json", []
    precise = {precision: {"no": "float32"}.get(precision, precision) for precision in arguments.precisions}
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    known = [run for run in known if not run["name"].endswith(tuple(precise.values()))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        images = load_dataset(arguments.data, split="train").select(range(STEPS * BATCH))
        (folder / "data").mkdir()
        # under the one name of the column that the other script knows
        images.select_columns("img").rename_column("img", "image").to_parquet(folder / "data" / "train.parquet")
        build_model("tiny", (3, RESOLUTION, RESOLUTION), 1000).save_config(folder / "unet")
        shared = SHARED | {"model_config_name_or_path": folder / "unet"}
        theirs = Path(arguments.script), THEIRS | {"dataset_name": folder / "data"}
        for repeat, precision, variant in itertools.product(range(REPEATS), arguments.precisions, VARIANTS):
            ours = ROOT / "training" / "train_vsdm.py", VARIANTS[variant] | {"train_data_dir": folder / "data"}
            own = [folder / f"{len(runs)}-{whose}" for whose in ("theirs", "ours")]
            common = shared | {"mixed_precision": precision}
            pair = [
                start(script, common | settings, own[i], (i + repeat) % 2)
                for i, (script, settings) in enumerate((theirs, ours))
            ]
            base, metrics = map(measured, pair, own)
            metrics["relative"] = metrics["images_per_second"] / base["images_per_second"]
            for name, found in ((f"train_unconditional.py beside {variant}", base), (variant, metrics)):
                runs.append({"name": f"{name}, {precise[precision]}", "seed": repeat, "metrics": found})
                print(runs[-1], flush=True)
    used = versions() | {"torchvision": torchvision.__version__, "python": platform.python_version()}
    record = {
        "command": "python -m benchmarks.training_speed",
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "configuration": {
            "steps": STEPS,
            "warmup": WARMUP,
            "batch": BATCH,
            "resolution": RESOLUTION,
            "network": "tiny",
        },
        "runs": [run | {"versions": used} for run in runs] + known,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
