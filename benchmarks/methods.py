"""VSDM beside what a careful user would try instead, on six data sets.

    python -m benchmarks.methods

Score-based models (lambda = 1) on raw, standardised and whitened data, VSDM in several settings, and conditional flow
matching with independent and with minibatch-optimal couplings (torchcfm): the same network, batch, number of gradient
steps, learning rates and averaging of the weights. Few-step samples are those of `trig` for the diffusions; flow
matching has the better one of Euler's and the midpoint method at each number of calls. Continues
`benchmarks/results/methods.json`, whose runs it does not repeat; needs torchcfm (`pip install -e .[dev]`).
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tables import RESULTS
from .workers import run_all


SAMPLES, CALLS = 2000, (6, 8, 10, 20, 100)
EQUAL = {"max_train_steps": 8000, "train_batch_size": 256, "num_eval_samples": 0, "prediction_type": "epsilon"}
RAW, STANDARDIZED = {"prior_type": "conditional"}, {"standardize": True}
METHODS: dict[str, dict[str, Any]] = {
    "SGM": RAW | {"baseline": "sgm", "beta_max": 20.0},
    "SGM standardised": STANDARDIZED | {"baseline": "sgm"},
    "SGM whitened": {"baseline": "sgm", "whiten": True},
    "VSDM, conditional prior": RAW,
    "VSDM, marginal prior": {},
    "VSDM standardised": STANDARDIZED,
    "VSDM standardised, dense": STANDARDIZED | {"basis": "dense"},
    "I-CFM": {"coupling": "ConditionalFlowMatcher"},
    "OT-CFM": {"coupling": "ExactOptimalTransportConditionalFlowMatcher"},
}
DATA = ("spiral-8y", "checkerboard-6x", "8gaussians", "moons", "swissroll", "mixture-20")


def mixture(n: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians in 20 dimensions, whose axes are 0.3 to 10 wide and turned at random; always the same law."""
    d, fixed = 20, torch.Generator().manual_seed(20)
    centers = torch.randn(8, d, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=fixed)).Q
    widths = torch.logspace(-0.5, 1, d)
    chosen = torch.randint(8, (n,), generator=generator)
    return (widths * (centers[chosen] + 0.3 * torch.randn(n, d, generator=generator))) @ rotation.T


def draw(name: str, n: int, seed: int) -> Tensor:
    """Points of a data set."""
    from diffusers_vsdm.data import sample_toy

    generator = torch.Generator().manual_seed(seed)
    return mixture(n, generator) if name == "mixture-20" else sample_toy(name, n, generator)


class Affine:
    """`x -> (x - mean) @ matrix`, and back."""

    def __init__(self, data: Tensor, whiten: bool):
        self.mean, covariance = data.mean(0), torch.atleast_2d(data.T.cov())
        values, vectors = torch.linalg.eigh(covariance)
        self.matrix = vectors / values.sqrt() if whiten else torch.diag(covariance.diagonal().rsqrt())

    def __call__(self, x: Tensor) -> Tensor:
        """Data units to model units."""
        return (x - self.mean) @ self.matrix

    def back(self, x: Tensor) -> Tensor:
        """The inverse, of `(..., d)`."""
        return x @ torch.linalg.inv(self.matrix) + self.mean


Model = tuple[Callable[[int], list[Tensor]], Tensor]


def diffusion(settings: dict[str, Any], data: Tensor, seed: int) -> Model:
    """Train; returns samples by number of calls, and Euler paths of the flow."""
    from diffusers_vsdm import VSDMScheduler
    from diffusers_vsdm.trainer import TrainingConfig, train
    from diffusers_vsdm.trainer.report import flow_paths

    settings = dict(settings)
    outside = Affine(data, whiten=True) if settings.pop("whiten", False) else None
    config = TrainingConfig(seed=seed, **EQUAL, **settings)
    pipeline = train(config, data if outside is None else outside(data)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    to_data = (lambda x: x) if outside is None else outside.back
    paths, _ = flow_paths(pipeline, SAMPLES, 99)
    pipeline.scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver="trig")

    def sample(calls: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [to_data(pipeline(SAMPLES, generator, num_inference_steps=calls, output_type="pt").samples)]

    return sample, to_data(paths)


def flow_matching(settings: dict[str, Any], data: Tensor, seed: int) -> Model:
    """The same for conditional flow matching on standardised data."""
    import numpy as np
    import torchcfm.conditional_flow_matching as flows
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    from diffusers_vsdm import MLPModel
    from diffusers_vsdm.trainer import TrainingConfig

    config = TrainingConfig(seed=seed, **EQUAL)
    torch.manual_seed(seed)
    np.random.seed(seed)  # torchcfm draws its couplings from it
    outside = Affine(data, whiten=False)
    data = outside(data)
    matcher = getattr(flows, settings["coupling"])(sigma=0.0)
    network = MLPModel(data.shape[1], config.ddpm_num_steps, config.model_width, config.model_num_blocks)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    steps = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
    rates = get_scheduler(config.lr_scheduler, optimizer, **steps)
    ema = EMAModel(network.parameters(), decay=config.ema_max_decay)

    def velocity(x: Tensor, t: Tensor | float) -> Tensor:
        return network(x, torch.as_tensor(t) * config.ddpm_num_steps - 1).sample

    for _ in range(config.max_train_steps):
        x1 = data[torch.randint(len(data), (config.train_batch_size,))]
        t, x, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        (velocity(x, t) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
    ema.copy_to(network.parameters())
    network.eval()
    noise = torch.randn(SAMPLES, data.shape[1], generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def integrate(steps: int, midpoint: bool) -> list[Tensor]:
        x, path = noise, [noise]
        for i in range(steps):
            v = velocity(x, i / steps)
            if midpoint:
                v = velocity(x + v / (2 * steps), (i + 0.5) / steps)
            x = x + v / steps
            path.append(x)
        return path

    def sample(calls: int) -> list[Tensor]:
        return [outside.back(integrate(calls, False)[-1]), outside.back(integrate(calls // 2, True)[-1])]

    return sample, outside.back(torch.stack(integrate(99, False)))


def run(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train and measure one model, in a process of its own."""
    name, method, seed = job
    from diffusers_vsdm.metrics.transport import normalized_path_energy, straightness, wasserstein2

    settings, data, reference = METHODS[method], draw(name, 100_000, seed), draw(name, SAMPLES, 10_001)
    started = time.perf_counter()
    sample, paths = (flow_matching if "coupling" in settings else diffusion)(settings, data, seed)
    seconds, scale = time.perf_counter() - started, data.std(0)
    bends = straightness(paths, 1 / 100)
    metrics = {
        f"w2_{calls}": min(wasserstein2(x, reference, standardize=True) for x in sample(calls)) for calls in CALLS
    } | {
        "w2_floor": wasserstein2(draw(name, SAMPLES, 10_002), reference, standardize=True),
        "straightness": bends.tolist(),
        "straightness_standardized": float((bends / scale).mean()),
        "normalized_path_energy": normalized_path_energy(paths / scale, 1 / 100),
        "seconds": seconds,
    }
    print(name, method, seed, {key: round(x, 3) for key, x in metrics.items() if key != "straightness"}, flush=True)
    return {"data": name, "name": method, "seed": seed, "metrics": metrics}


def main() -> None:
    """Every method on every data set; the record grows as they end, and is continued where it was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    from diffusers_vsdm.trainer.report import versions

    path = RESULTS / "methods.json"
    record: dict[str, Any] = {"command": "python -m benchmarks.methods", "versions": versions(), "runs": []}
    if path.exists():
        record["runs"] = json.loads(path.read_text())["runs"]
    done = {(known["data"], known["name"], known["seed"]) for known in record["runs"]}
    jobs = [job for seed in seeds for name in DATA for method in METHODS if (job := (name, method, seed)) not in done]
    for result in run_all(run, jobs):
        record["runs"].append(result)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
