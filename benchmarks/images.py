"""Which drift is best on images: FID and KID of small models of CIFAR-10, in few network calls and in many.

    torchrun --nproc_per_node 2 -m benchmarks.images chain --data DATA   # test images against training images
    python -m benchmarks.images pilot --data DATA      # at 16x16, every method with every beta_max
    python -m benchmarks.images table --data DATA      # at 32x32, every method as the pilot found best
    python -m benchmarks.images flow --data DATA       # how near few-step solvers come to the flow's end there
    python -m benchmarks.images bridge --data DATA     # at 16x16, SB-FBSDE where the process is too short
    python -m benchmarks.images spectrum --data DATA   # the learned lambda beside the data's spectrum

DATA is a folder with `cifar10/`, the data set as on the Hub; `fid/inception_2015_12_05_features.safetensors`, the
weights of FID's Inception network; and `fid/cifar10_train_stats.npz`, the statistics of all training images. All runs
go through `training/train_vsdm.py` and `training/evaluate.py`, one for each core at a time, in `outputs/images/`, and
what is there is not done again. Writes `benchmarks/results/images_*.json` after each run of a sampler, and does not
repeat those that it finds there with the same settings.
"""

import argparse
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffusers_vsdm import VSDMPipeline, VSDMScheduler
from diffusers_vsdm.data.images import load_images
from diffusers_vsdm.metrics.fidelity import FeatureStatistics, InceptionFeatures, frechet_distance
from diffusers_vsdm.trainer.fidelity import SamplingRun, reference_features
from diffusers_vsdm.trainer.processes import process_state
from diffusers_vsdm.trainer.report import versions

from .tables import RESULTS, ROOT


WORK = ROOT / "outputs" / "images"
BETA_MAX = (10, 14, 20)
ZETA = 0.9
METHODS: dict[str, dict[str, Any]] = {
    "SGM": {"baseline": "sgm", "basis": "dct"},
    "VSDM, one": {"basis": "dct", "lambda_per": "all", "zeta": ZETA},
    "VSDM, per channel": {"lambda_per": "channel", "zeta": ZETA},
    "VSDM, per pixel": {"zeta": ZETA},
    "VSDM, per frequency": {"basis": "dct", "zeta": ZETA},
}
# the same three with EDM's preconditioning in frequencies
METHODS |= {
    f"{name}, edm per frequency": METHODS[name] | {"prediction_type": "edm"}
    for name in ("SGM", "VSDM, one", "VSDM, per frequency")
}
COMMON = {
    "random_flip": True,
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "mixed_precision": "bf16",
    "sa_stages": 20,
    "sa_trajectories": 32,
    "sa_steps": 50,
    "num_eval_samples": 64,
}
PILOT = COMMON | {"resolution": 16, "max_train_steps": 1000}
PILOT_RUNS, PILOT_IMAGES = ("trig@6", "trig@20"), 500
# what else could be better than the methods as they are, at one beta_max
VARIANTS: dict[str, dict[str, Any]] = {
    "SGM, v": METHODS["SGM"] | {"prediction_type": "v_prediction"},
    "SGM, edm per pixel": {"baseline": "sgm", "prediction_type": "edm"},
    "SGM, edm per pixel, log-normal times": {
        "baseline": "sgm",
        "prediction_type": "edm",
        "time_sampling": "log_normal",
    },
    "VSDM, per pixel, edm per pixel, log-normal times": METHODS["VSDM, per pixel"]
    | {"prediction_type": "edm", "time_sampling": "log_normal"},
    "SGM, edm per frequency, log-normal times": METHODS["SGM, edm per frequency"] | {"time_sampling": "log_normal"},
    "VSDM, per frequency, zeta 0.75": METHODS["VSDM, per frequency"] | {"zeta": 0.75},
    "VSDM, per frequency, zeta 0.97": METHODS["VSDM, per frequency"] | {"zeta": 0.97},
}
VARIANT_BETA_MAX = 14
# what the pilot found best, for all alike; in frequencies, but for those that know pixels
TABLE = COMMON | {"prediction_type": "edm", "time_sampling": "log_normal", "beta_max": 10}
TABLE |= {"max_train_steps": 1000, "ddpm_num_steps": 1000, "channels_last": True}
TABLE_METHODS: dict[str, dict[str, Any]] = {
    "SGM": METHODS["SGM"],
    "VSDM, per frequency": METHODS["VSDM, per frequency"],
    "VSDM, one": METHODS["VSDM, one"],
    "VSDM, per channel": METHODS["VSDM, per channel"] | {"basis": "dct"},
    "VSDM, per pixel": METHODS["VSDM, per pixel"],
}
TABLE_RUNS, TABLE_IMAGES = ("trig@6", "trig@10", "trig@20", "trig@35", "euler-maruyama@200"), 2000
# as many gradient steps of all networks together
BRIDGE = PILOT | {"prediction_type": "edm", "time_sampling": "log_normal", "max_train_steps": 2000}
BRIDGE_METHODS: dict[str, dict[str, Any]] = {
    "SGM, 10": METHODS["SGM"] | {"beta_max": 10},
    "SGM, 3": METHODS["SGM"] | {"beta_max": 3},
    "VSDM, per frequency, 3": METHODS["VSDM, per frequency"] | {"beta_max": 3},
    "SB-FBSDE, 3": METHODS["SGM"]
    | {"beta_max": 3, "max_train_steps": 1000, "bridge_stages": 4, "bridge_steps": 125}
    | {"bridge_paths": 256, "bridge_refresh": 25, "bridge_num_steps": 20},
}
BRIDGE_RUNS = ("trig@6", "trig@20", "euler-maruyama@50")
REFERENCE_IMAGES = 2000
FLOW_SOLVERS = ("trig-fitted", "trig", "unipc:3/log_snr_mean", "dpmsolver++:2/quadratic", "ipndm:3/log_snr_mean")
FLOW_CALLS, FLOW_END, FLOW_IMAGES = (5, 6, 8, 10, 20), "unipc:2/log_snr_mean@250", 16


def flags(settings: dict[str, Any]) -> list[str]:
    """Of a command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", *map(str, _several(value)))]


def _several(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def launch(script: str, settings: dict[str, Any], log: Path, core: int) -> None:
    """A script on one core.

    Raises:
        RuntimeError: It failed; with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        outcome = subprocess.run(
            [*command, *flags(settings)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    if outcome.returncode:
        raise RuntimeError(log.read_text()[-2000:])


def train(name: str, settings: dict[str, Any], data: Path, core: int) -> None:
    """A model in `outputs/images/NAME`, unless it is there; where it was stopped it goes on."""
    folder = WORK / name
    if (folder / "metrics.json").exists():
        return
    own = {"train_data_dir": data / "cifar10", "output_dir": folder, "checkpointing_steps": 250}
    own |= {"checkpoints_total_limit": 1, "overwrite_output_dir": True}
    if list(folder.glob("checkpoint-*")):
        own["resume_from_checkpoint"] = "latest"
    script = f"training/train_{'sb_fbsde' if 'bridge_stages' in settings else 'vsdm'}.py"
    launch(script, settings | own, folder.with_name(f"{folder.name}.log"), core)


def measure(name: str, settings: dict[str, Any], run: str, data: Path, core: int) -> dict[str, Any]:
    """What is measured of that model by one sampler; all share the features of the reference images."""
    folder, shared = WORK / name / "fidelity" / run, WORK / f"reference-{settings['resolution']}"
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference").exists():
        (folder / "reference").symlink_to(shared, target_is_directory=True)
    own = {
        "pretrained_model_name_or_path": WORK / name,
        "fidelity": True,
        "train_data_dir": data / "cifar10",
        "feature_weights": data / "fid" / "inception_2015_12_05_features.safetensors",
        "num_reference_images": REFERENCE_IMAGES,
        "output_dir": folder,
        "mixed_precision": "bf16",
        "runs": run,
    }
    launch("training/evaluate.py", own | settings, folder.with_name(f"{folder.name}.log"), core)
    (row,) = json.loads((folder / "metrics.json").read_text())["metrics"]["runs"]
    return {f"{name} {run}": row[name] for name in ("fid", "kid", "kid_std")}


def study(
    name: str,
    models: dict[str, dict[str, Any]],
    samplers: tuple[str, ...],
    evaluation: dict[str, Any],
    data: Path,
    cores: int,
) -> None:
    """Train and measure what the record lacks."""
    place = RESULTS / f"images_{name}.json"
    rest = {key: value for key, value in evaluation.items() if key != "statistics"} | {"runs": samplers}
    configs = {model: json.loads(json.dumps({**settings, **rest})) for model, settings in models.items()}
    found = {run["name"]: run for run in json.loads(place.read_text())["runs"]} if place.exists() else {}
    found = {model: run for model, run in found.items() if run["config"] == configs.get(model)}
    writing = threading.Lock()
    free: queue.Queue[int] = queue.Queue()
    for core in range(cores):
        free.put(core)

    def add(model: str, metrics: dict[str, Any]) -> None:
        with writing:
            run = found.setdefault(model, {"name": model, "seed": 0, "metrics": {}, "config": configs[model]})
            run["metrics"] |= metrics
            run["versions"] = versions()
            record = {
                "command": f"python -m benchmarks.images {name} --data DATA",
                "machine": {"cores": cores, "threads of each": 1},
                "runs": [found[model] for model in models if model in found],
            }
            place.write_text(json.dumps(record, indent=1) + "\n")

    def whole(model: str) -> None:
        known = found[model]["metrics"] if model in found else {}
        missing = [run for run in samplers if f"fid {run}" not in known]
        core = free.get()
        try:
            if missing:
                train(f"{name}/{slug(model)}", models[model], data, core)
                trained = json.loads((WORK / name / slug(model) / "metrics.json").read_text())["metrics"]
                add(model, {key: trained[key] for key in ("seconds", "start_seconds", "lambda") if key in trained})
            for run in missing:
                add(model, measure(f"{name}/{slug(model)}", evaluation, run, data, core))
        finally:
            free.put(core)

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(whole, models):
            pass


def slug(name: str) -> str:
    """A name for a folder."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in name).replace("--", "-").lower()


def pilot(data: Path, cores: int) -> None:
    """Every method with every beta_max, and some variants at one."""
    models = {
        f"{name}, {beta_max}": PILOT | settings | {"beta_max": beta_max}
        for name, settings in METHODS.items()
        for beta_max in BETA_MAX
    }
    models |= {
        f"{name}, {VARIANT_BETA_MAX}": PILOT | settings | {"beta_max": VARIANT_BETA_MAX}
        for name, settings in VARIANTS.items()
    }
    evaluation = {"resolution": 16, "num_images": PILOT_IMAGES, "batch_size": 100}
    study("pilot", models, PILOT_RUNS, evaluation, data, cores)


def table(data: Path, cores: int) -> None:
    """Every method as the pilot found best."""
    models = {name: TABLE | settings for name, settings in TABLE_METHODS.items()}
    evaluation = {"resolution": 32, "num_images": TABLE_IMAGES, "batch_size": 100}
    evaluation |= {"statistics": data / "fid" / "cifar10_train_stats.npz"}
    study("table", models, TABLE_RUNS, evaluation, data, cores)


def bridge(data: Path, cores: int) -> None:
    """Networks on both sides, and on one, of a short process and of one that is long enough."""
    models = {name: BRIDGE | settings for name, settings in BRIDGE_METHODS.items()}
    evaluation = {"resolution": 16, "num_images": PILOT_IMAGES, "batch_size": 100}
    study("bridge", models, BRIDGE_RUNS, evaluation, data, cores)


@torch.no_grad()
def flow(data: Path, cores: int) -> None:
    """Root mean square distances from the ends of the flow of the trained models of the table, in float32."""
    runs = []
    trained = [name for name in TABLE_METHODS if (WORK / "table" / slug(name) / "metrics.json").exists()]
    for name in trained:
        pipeline = VSDMPipeline.from_pretrained(WORK / "table" / slug(name))
        network, drift = pipeline.unet.eval(), pipeline.scheduler.drift
        start = pipeline.scheduler.sample_prior(
            (FLOW_IMAGES, *drift.event_shape), generator=torch.Generator().manual_seed(0)
        )

        def sample(text: str, pipeline: Any = pipeline, network: Any = network, start: Any = start) -> torch.Tensor:
            run = SamplingRun.parse(text)
            scheduler, x = run.scheduler(pipeline.scheduler), start
            scheduler.set_timesteps(run.num_steps)
            for k in scheduler.timesteps:
                x = scheduler.step(network(scheduler.scale_model_input(x, k), k).sample, k, x).prev_sample
            return x

        end = sample(FLOW_END)
        for solver in FLOW_SOLVERS:
            metrics = {}
            for calls in FLOW_CALLS:
                errors = (sample(f"{solver}@{calls}") - end).square().flatten(1).mean(1).sqrt()
                metrics |= {f"{calls}": float(errors.mean()), f"{calls} error": float(errors.std()) / FLOW_IMAGES**0.5}
            runs.append({"name": f"{name}, `{solver}`", "seed": 0, "metrics": metrics})
        print(runs[-len(FLOW_SOLVERS) :], flush=True)
    record = {"command": "python -m benchmarks.images flow --data DATA", "versions": versions(), "runs": runs}
    (RESULTS / "images_flow.json").write_text(json.dumps(record, indent=1) + "\n")


def spectrum(data: Path, cores: int) -> None:
    """The learned lambda of every frequency beside the data's variance there, of the pilot's model, as a picture."""
    from matplotlib.figure import Figure

    folder = WORK / "pilot" / slug(f"VSDM, per frequency, {VARIANT_BETA_MAX}")
    drift = VSDMScheduler.from_pretrained(folder, subfolder="scheduler").drift
    assert drift is not None
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    by_variance, by_frequency = figure.subplots(1, 2)
    size = drift.event_shape[1]
    i = torch.arange(float(size))
    radius = torch.hypot(i[:, None], i[None, :]).round()
    for channel, label in enumerate(("brightness", "second axis of colour", "third axis")):
        lam, variance = drift.lam[channel], drift.data_variance[channel]
        by_variance.scatter(variance.flatten(), lam.flatten(), s=3, label=label)
        means = [float(lam[radius == r].mean()) for r in range(size)]
        by_frequency.plot(means, label=label)
    by_variance.set(xscale="log", xlabel="variance of the data", ylabel=r"$\lambda$", ylim=0)
    by_frequency.set(xlabel="radial frequency", ylabel=r"mean $\lambda$", ylim=0)
    by_frequency.legend(fontsize="small")
    figure.savefig(ROOT / "docs" / "images_spectrum.png")


def chain(data: Path, cores: int) -> None:
    """FID of the 10,000 test images against the statistics of the training images, which the literature knows."""
    features = InceptionFeatures(data / "fid" / "inception_2015_12_05_features.safetensors")
    images = load_images(str(data / "cifar10"), split="test")
    found = reference_features(images, len(images), 0, WORK / "test-features", features)
    if not process_state().is_main_process:
        return
    statistics = FeatureStatistics.load(data / "fid" / "cifar10_train_stats.npz")
    statistics.check(found)
    record = {
        "command": "torchrun --nproc_per_node 2 -m benchmarks.images chain --data DATA",
        "versions": versions(),
        "fid": frechet_distance(found, statistics),
        "num_samples": len(found),
    }
    (RESULTS / "images_chain.json").write_text(json.dumps(record, indent=1) + "\n")


STUDIES = {"chain": chain, "pilot": pilot, "table": table, "bridge": bridge, "flow": flow, "spectrum": spectrum}


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    STUDIES[arguments.study](arguments.data.resolve(), os.cpu_count() or 1)


if __name__ == "__main__":
    main()
