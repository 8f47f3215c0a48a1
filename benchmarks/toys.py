"""Studies on the two-dimensional toys.

    python -m benchmarks.toys table4           # the VSDM paper's setting: raw axes, zeta 0.75
    python -m benchmarks.toys convergence      # the same in twenty stages, their steps by changes of sign
    python -m benchmarks.toys simulation       # twice the steps in each simulated trajectory
    python -m benchmarks.toys turned           # axes that are not those of the coordinates
    python -m benchmarks.toys budget           # how many stages
    python -m benchmarks.toys default          # the README's command, in few steps
    python -m benchmarks.toys standardized     # the README's command, over zeta, beside a score-based model
    python -m benchmarks.toys search           # one setting changed at a time, to choose the defaults
    python -m benchmarks.toys prediction       # what the network predicts, on more data

Every run is a training run with the package's own trainer, in a process of its own. A study writes a JSON record to
`benchmarks/results/`; `python -m benchmarks.tables` makes the tables of the docs from the records. The models of
`table4` stay in `outputs/table4/`, for `python -m benchmarks.figures`.
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .tables import RESULTS
from .workers import run_all


FEW_STEPS: dict[str, tuple[int, ...]] = {"heun": (3, 5, 10), "trig": (6, 10)}
SHOWN: dict[str, dict[str, tuple[int, ...]]] = {"table4": {"heun": (5,)}, "budget": {}}  # of them, where W2 takes long
KEPT = {"table4": Path("outputs") / "table4"}

# the toys of the paper; half the package's batch, which changed nothing in these
EPSILON = {"prediction_type": "epsilon"}
PAPER = EPSILON | {
    "prior_type": "conditional",
    "zeta": 0.75,
    "solver": "euler",
    "train_batch_size": 256,
    "num_likelihood_samples": 0,
}
METHODS = {
    "SGM-20": {"baseline": "sgm", "beta_max": 20.0},
    "SGM-30": {"baseline": "sgm", "beta_max": 30.0},
    "VSDM-10": {"beta_max": 10.0},
    "VSDM-20": {"beta_max": 20.0},
}
# twenty stages, and full steps that shrink with each change of sign
TWENTY_STAGES = {"sa_stages": 20, "sa_step_count": "sign_changes", "sa_step_scale": 1.0, "sa_step_offset": 0.0}
STANDARDIZED = {"standardize": True, "prior_type": "marginal"}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    *({"zeta": zeta} for zeta in (0.5, 0.6, 0.9, 1.0)),
    *({"beta_max": beta} for beta in (5.0, 7.0, 14.0, 20.0)),
    *({"weighting": name} for name in ("score", "likelihood", "min_snr")),
    {"time_sampling": "log_snr"},
    *({"prediction_type": name} for name in ("v_prediction", "sample", "edm")),
    {"prior_type": "conditional"},
    {"standardize": False},
    {"standardize": False, "prior_type": "conditional"},
    {"basis": "dense"},
)
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "table4": {
        f"{toy} {method}": PAPER | {"dataset_name": toy} | settings
        for toy, methods in {
            "spiral-8y": {"SGM-10": {"baseline": "sgm", "beta_max": 10.0}} | METHODS,
            "checkerboard-6x": METHODS,
        }.items()
        for method, settings in methods.items()
    },
    "convergence": {
        f"{toy} {method}": PAPER | METHODS[method] | {"dataset_name": toy} | TWENTY_STAGES
        for toy in ("spiral-8y", "checkerboard-6x")
        for method in ("VSDM-10", "VSDM-20")
    },
    "simulation": {
        f"{name} VSDM-10, 100 steps": PAPER
        | {"dataset_name": name, "beta_max": 10.0, "sa_steps": 100, "train_batch_size": 512}
        for name in ("spiral-8y", "checkerboard-6x")
    },
    "turned": {
        "spiral-8y": PAPER | METHODS["VSDM-10"] | {"dataset_name": "spiral-8y"},
        **{
            f"turned by 30 degrees, {basis}": PAPER
            | METHODS["VSDM-10"]
            | {"dataset_name": "spiral-8y-turned", "basis": basis}
            for basis in ("identity", "dense")
        },
    },
    # none and 40 are in table4
    "budget": {"10 stages": PAPER | {"dataset_name": "spiral-8y", "sa_stages": 10}},
    "default": {
        "SGM": STANDARDIZED | {"dataset_name": "spiral-8y", "baseline": "sgm"},
        "VSDM": STANDARDIZED | {"dataset_name": "spiral-8y"},
    },
    "standardized": {
        "SGM": STANDARDIZED | EPSILON | {"baseline": "sgm"},
        **{f"VSDM, zeta {zeta}": STANDARDIZED | EPSILON | {"zeta": zeta} for zeta in (0.6, 0.75, 0.9)},
    },
    "search": {
        f"{toy}: {', '.join(f'{key} {value}' for key, value in change.items()) or 'default'}": {
            "dataset_name": toy,
            "train_batch_size": 256,
        }
        | STANDARDIZED
        | EPSILON
        | change
        for change in CHANGES
        for toy in ("spiral-8y", "checkerboard-6x")
    },
    "prediction": {
        f"{toy}, {prediction.split('_')[0]}": STANDARDIZED
        | {"dataset_name": toy, "train_batch_size": 256, "prediction_type": prediction}
        for toy in ("spiral-8y", "checkerboard-6x", "8gaussians", "moons", "swissroll")
        for prediction in ("epsilon", "v_prediction")
    },
}


def run(job: tuple[str, str, dict[str, Any], int]) -> dict[str, Any]:
    """Train one model and measure it; runs in its own process."""
    study, name, settings, seed = job
    import torch

    from diffusers_vsdm.data import sample_toy
    from diffusers_vsdm.data.toys import rotation
    from diffusers_vsdm.metrics.transport import (
        normalized_path_energy,
        pmf_distance,
        sliced_wasserstein1,
        straightness,
        wasserstein2,
    )
    from diffusers_vsdm.schedulers import VSDMScheduler
    from diffusers_vsdm.trainer import TrainingConfig, train
    from diffusers_vsdm.trainer.report import EVALUATION_SEED, evaluate

    config = TrainingConfig(seed=seed, **settings)
    result = train(config)
    pipeline = result.pipeline
    metrics, paths = evaluate(pipeline, config.dataset_name, config.num_eval_samples, config.num_eval_steps)
    if study in KEPT and seed == 0:
        pipeline.save_pretrained(KEPT[study] / name.replace(" ", "-"))
    turned = config.dataset_name.endswith("-turned")
    upright = rotation(30) if turned else torch.eye(2)
    reference = sample_toy(config.dataset_name, 3000, torch.Generator().manual_seed(EVALUATION_SEED + 1)) @ upright
    if turned:  # measured along the axes of what was turned
        paths = paths @ upright
        metrics |= {
            "straightness": straightness(paths, 1 / config.ddpm_num_steps).tolist(),
            "w2_standardized": wasserstein2(paths[-1], reference, standardize=True),
            "axis": axis_of_largest_lambda(pipeline.scheduler.drift),
        }
    metrics |= {
        "normalized_path_energy": normalized_path_energy(paths, 1 / config.ddpm_num_steps),
        "sliced_w1_standardized": sliced_wasserstein1(paths[-1], reference, standardize=True),
        "pmf_distance": pmf_distance(paths[-1], reference),
    }
    pipeline.set_progress_bar_config(disable=True)
    for solver, numbers in SHOWN.get(study, FEW_STEPS).items():  # to the data
        pipeline.scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver=solver)
        for steps in numbers:
            generator = torch.Generator().manual_seed(EVALUATION_SEED)
            samples = pipeline(3000, generator, num_inference_steps=steps, output_type="pt").samples @ upright
            calls = 2 * steps - 1 if solver == "heun" else steps
            metrics[f"w2_{solver}_{calls}"] = wasserstein2(samples, reference, standardize=True)
    scaled = result.lambdas * config.beta_max
    if result.likelihood is not None:
        metrics["nll"] = result.likelihood["nll"]
    metrics |= {
        "lambda_beta_max": (pipeline.scheduler.drift.lam * config.beta_max).tolist(),
        "lambda_beta_max_per_stage": scaled.tolist(),
        "seconds": result.seconds,
        "sa_seconds": result.sa_seconds,
        "sa_share": result.sa_seconds / result.seconds,
        "sa_skipped": result.sa_skipped,
        "final_loss": result.final_loss,
    }
    print(
        f"{name}, seed {seed}: W2 {metrics['w2_standardized']:.3f}, straightness"
        f" {' / '.join(f'{x:.1f}' for x in metrics['straightness'])}, {result.seconds:.0f} s",
        flush=True,
    )
    return {"name": name, "seed": seed, "metrics": metrics, "config": asdict(config)}


def axis_of_largest_lambda(drift: Any) -> float:
    """Its angle to the second coordinate, counterclockwise, in degrees within [-90, 90)."""
    x, y = drift.basis().from_basis((drift.lam == drift.lam.max()).double()).tolist()
    return (math.degrees(math.atan2(-x, y)) + 90) % 180 - 90


def main() -> None:
    """Run a study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    study = arguments.study
    jobs = [(study, name, s, seed) for seed in arguments.seeds for name, s in STUDIES[study].items()]
    from diffusers_vsdm.trainer.report import versions

    record: dict[str, Any] = {
        "study": study,
        "command": f"python -m benchmarks.toys {study}",
        "versions": versions() | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "threads of each": 1},
        "runs": [],
    }
    started, path = time.perf_counter(), RESULTS / f"toys_{study}.json"
    for result in run_all(run, jobs):
        record["runs"].append(result)
        record["minutes"] = (time.perf_counter() - started) / 60
        # as it grows: a study that is broken off leaves what it has
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.name}: {record['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
