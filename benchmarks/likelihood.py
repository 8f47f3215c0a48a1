"""Log-likelihoods beside the truth, and of models of images.

    python -m benchmarks.likelihood exact      # a perfect score: what the solver's tolerance costs
    python -m benchmarks.likelihood trained    # models trained on a mixture whose density is known
    python -m benchmarks.likelihood images     # bits per dimension of models of images

The mixture is "8 gaussians, d = 2" of `tests/problems.py`, and the truth is its density at the same 10,000 points. The
images are CIFAR-10's test set at 16x16, in the folder `cifar10` that the variable VSDM_TEST_DATA leads to; their
models are those that `model_cards/cifar10-*` tell how to train, in `outputs/`. Writes
`benchmarks/results/likelihood_*.json`.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMScheduler, process
from diffusers_vsdm.likelihood import flow_log_likelihood
from diffusers_vsdm.objectives import Estimate
from diffusers_vsdm.trainer import TrainingConfig, train
from diffusers_vsdm.trainer.evaluation import EvaluationConfig, evaluate
from diffusers_vsdm.trainer.report import versions
from tests.problems import benchmarks

from .tables import RESULTS


POINTS, TRAINING_POINTS = 10_000, 100_000
SEEDS = (0, 1, 2)
TRAINED: dict[str, dict[str, Any]] = {
    "SGM": {"baseline": "sgm"},
    "VSDM": {},
    "VSDM, of ε": {"prediction_type": "epsilon"},
}
IMAGES = {"per pixel": "outputs/cifar10-pixels", "per frequency": "outputs/cifar10-frequencies"}


PROBLEM = benchmarks()["8 gaussians, d = 2"]


def points(n: int, seed: int) -> Tensor:
    """A sample of the mixture."""
    return PROBLEM.sample(n, torch.Generator().manual_seed(seed)).float()


def paired(value: Tensor, x: Tensor) -> dict[str, float]:
    """How far the truth is above: an estimate of KL(data || model)."""
    difference = Estimate.of(PROBLEM.log_prob(x) - value)
    return {"difference": difference.value, "standard_error": difference.standard_error}


def exact() -> list[dict[str, Any]]:
    """On DDPM's table, from g = 1e-4."""
    x, scheduler = points(POINTS, 1), VSDMScheduler()
    scheduler.set_drift(AdaptiveDiagonalDrift((2,)))

    def score(x: Tensor, k: Tensor) -> Tensor:
        g = scheduler.integrated_beta_at(k[:1])
        return (-PROBLEM.eps(x, g) / process.std(PROBLEM.lam, g)).to(x)

    runs = []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        found = flow_log_likelihood(score, scheduler, x.double(), rtol=tolerance, atol=tolerance)
        metrics = paired(found.value, x) | {"num_function_evaluations": found.num_function_evaluations}
        runs.append({"name": f"{tolerance:g}", "seed": 1, "metrics": metrics})
    return runs


def trained() -> list[dict[str, Any]]:
    """The README's settings."""
    runs, x = [], points(POINTS, 1)
    for seed in SEEDS:
        for name, settings in TRAINED.items():
            config = TrainingConfig(
                seed=seed, standardize=True, train_batch_size=256, num_likelihood_samples=0, **settings
            )
            pipeline = train(config, points(TRAINING_POINTS, 100 + seed)).pipeline
            found = pipeline.log_likelihood(x)
            bound = pipeline.likelihood_bound(x, 32, torch.Generator().manual_seed(seed))
            metrics = paired(found.value, x) | {
                "nll": -float(found.value.mean()),
                "nll_evaluations": found.num_function_evaluations,
                "bound": float(bound.total.mean()),
                **{name: float(part.mean()) for name, part in vars(bound).items()},
                "first_time": float(pipeline.scheduler.integrated_beta[0]),
            }
            runs.append({"name": name, "seed": seed, "metrics": metrics})
            print(name, seed, metrics, flush=True)
    return runs


def images() -> list[dict[str, Any]]:
    """On 1,000 test images."""
    (test,) = (Path(os.environ["VSDM_TEST_DATA"]) / "cifar10").glob("test-*.parquet")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train-00000-of-00001.parquet").symlink_to(test.resolve())  # alone, it is what is read
        for name, model in IMAGES.items():
            config = EvaluationConfig(
                pretrained_model_name_or_path=model,
                likelihood=True,
                train_data_dir=folder,
                resolution=16,
                num_times=16,
                rtol=1e-4,
                atol=1e-4,
            )
            started = time.perf_counter()
            metrics = evaluate(config)
            metrics["seconds"] = time.perf_counter() - started
            runs.append({"name": name, "seed": config.seed, "metrics": metrics})
            print(name, metrics, flush=True)
    return runs


STUDIES = {"exact": exact, "trained": trained, "images": images}


def main() -> None:
    """Run a study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args().study
    record = {
        "command": f"python -m benchmarks.likelihood {study}",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "runs": STUDIES[study](),
    }
    (RESULTS / f"likelihood_{study}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
