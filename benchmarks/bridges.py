"""Score-based models, VSDM and SB-FBSDE on the same network and as many gradient steps: quality, and what it costs.

    python -m benchmarks.bridges toys [--seeds 0 1 2]
    python -m benchmarks.bridges transport [--seeds 0 1 2]
    python -m benchmarks.bridges gaussian [--seeds 0 1 2]

- `toys`: from a Gaussian to toys, and from the moons to the 8 gaussians. W2 beside the floor of two samples of the
  data, by the backward SDE, by the probability flow, and of the forward end; the energy of the flow's paths; on the
  8 gaussians, whose density is known, the negative log-likelihood of the flow and the bound of the SDE, less the true
  one; on the spiral runs of fewer steps, for W2 against time.
- `transport`: from a Gaussian to mixtures whose entropic transport is known, see [`benchmarks.entropic`]: how far from
  it the law of the model's ends is, given a start and over all, by their first two moments. The reference is Brownian
  motion of variance epsilon (VE, lambda = 0), or the Ornstein-Uhlenbeck process with 2 sinh(g_T / 2) = epsilon (VP,
  lambda = 1), whose ends have the same plan; VSDM learns lambda over it.
- `gaussian`: from N(0, I) to a Gaussian, where the bridge is known in closed form: how far the forward network is from
  its drift, and whether joint training finds it, also from paths that turn, which bound the likelihood as well.

Writes `benchmarks/results/bridges_*.json`, a run at a time; what is there is not done again.
"""

import argparse
import json
import math
import time
from typing import Any

import torch

from diffusers_vsdm.objectives import Estimate
from tests.problems import GaussianMixture

from .entropic import EntropicTransport, bures_wasserstein, moments, unexplained_variance
from .tables import RESULTS
from .workers import run_all


STEPS = 12_000  # gradient steps of all networks together
START = 4_000  # of them those of the model that bridges start from
STAGES = 4
HALF = (STEPS - START) // (2 * STAGES)
JOINT_SCALE = 10  # simulated paths are differentiated in every step: a tenth of the steps
BRIDGE = {"max_train_steps": START, "bridge_stages": STAGES, "bridge_steps": HALF, "beta_max": 3.0}
METHODS: dict[str, dict[str, Any]] = {
    # from the marginal prior, as such models are sampled by default
    f"{name}, beta_max {beta_max}": {"baseline": baseline, "beta_max": float(beta_max), "prior_type": "marginal"}
    for name, baseline in (("SGM", "sgm"), ("VSDM", "none"))
    for beta_max in (3, 10)
} | {
    "SB-FBSDE, matching": BRIDGE | {"objective": "matching"},
    "SB-FBSDE, alternating": BRIDGE | {"objective": "alternating"},
    "SB-FBSDE, joint": BRIDGE | {"objective": "joint", "bridge_steps": HALF // JOINT_SCALE, "bridge_num_steps": 20},
    "SB-FBSDE, joint, control energy 0.1": BRIDGE
    | {"objective": "joint", "bridge_steps": HALF // JOINT_SCALE, "bridge_num_steps": 20, "control_energy": 0.1},
}
HALF_BRIDGES = ("SB-FBSDE, matching", "SB-FBSDE, alternating")
# how soon each is as good
SHORTER = {
    f"VSDM, beta_max 10, {n} steps": METHODS["VSDM, beta_max 10"] | {"max_train_steps": n}
    for n in (600, 1200, 2400, 4800)
} | {
    f"{name}, {n} steps": METHODS[name] | {"max_train_steps": START * n // STEPS, "bridge_steps": HALF * n // STEPS}
    for name in HALF_BRIDGES
    for n in (1200, 2400, 4800)
}
AS_MANY = {"SB-FBSDE, joint, as many steps": METHODS["SB-FBSDE, joint"] | {"bridge_steps": HALF}}
# as the script does without being told
DEFAULTS = {"SB-FBSDE, matching, longer": {"objective": "matching", "beta_max": 3.0, "baseline": "sgm"}}
# the noise is small beside the distances, and the half bridges' iterations are slow to converge
PATIENT = {"SB-FBSDE, matching, 12 stages": METHODS["SB-FBSDE, matching"] | {"bridge_stages": 12}}
EXTRA = {
    "spiral-8y": SHORTER,
    "8gaussians": DEFAULTS | AS_MANY,
    "moons to 8gaussians, wide": PATIENT,
}
TOYS = ("8gaussians", "moons", "checkerboard", "spiral-8y")
BETWEEN: dict[str, dict[str, Any]] = {
    "moons to 8gaussians": {"dataset_name": "8gaussians", "prior_dataset_name": "moons", "sigma_max": 1.5},
    # the literature's scale and number of samples
    "moons to 8gaussians, wide": {
        "dataset_name": "8gaussians-wide",
        "prior_dataset_name": "moons-wide",
        "sigma_max": 1.0,
        "num_eval_samples": 10_000,
    },
}
LIKELIHOODS = 10_000
COUNTS = ("max_train_steps", "bridge_steps")
KNOWN_METHODS: dict[str, dict[str, Any]] = {"SGM": {"baseline": "sgm"}, "VSDM": {"baseline": "none"}} | {
    name: {key: value for key, value in METHODS[name].items() if key != "beta_max"}
    for name in (*HALF_BRIDGES, "SB-FBSDE, joint")
}
ALL_THE_WAY = {"VSDM, zeta 1": {"baseline": "none", "zeta": 1.0}}  # to the prior
TRANSPORT_METHODS = {  # of many problems, with half as many steps
    name: method | {key: value // 2 for key, value in ({"max_train_steps": STEPS} | method).items() if key in COUNTS}
    for name, method in (KNOWN_METHODS | ALL_THE_WAY).items()
}
DIMENSIONS, EPSILONS = (2, 16, 64), (0.1, 1, 10)
POWER = 1.7  # of the power law
ROWS, COLUMNS = 25, 1000  # samples of the source, and of the law given each of them
ENDS, REFERENCE = 20_000, 100_000
MEAN, COVARIANCE = (1.0, -0.5), ((2.0, 1.0), (1.0, 1.5))
TURNING = 2.0  # radians in a unit of g: turned paths end in the same Gaussian
JOINT = KNOWN_METHODS["SB-FBSDE, joint"]
STARTS = (("", 0.0), ("", 0.1), ("", 1.0), (" from turning paths", 0.0), (" from turning paths", 1.0))
GAUSSIAN_METHODS = {name: KNOWN_METHODS[name] for name in HALF_BRIDGES} | {
    f"SB-FBSDE, joint{start}, control energy {weight}": JOINT | {"control_energy": weight} for start, weight in STARTS
}
LONGER = 5
GAUSSIAN_METHODS |= {
    f"{name}, five times as long": method | {"bridge_steps": LONGER * method["bridge_steps"]}
    for name, method in GAUSSIAN_METHODS.items()
    if "turning" in name
}


def trained(config: Any, method: str) -> tuple[Any, dict[str, float]]:
    """A model by one of the methods, and the seconds of its training: all of them, and of the last kind of step."""
    from diffusers_vsdm import BridgePipeline
    from diffusers_vsdm.trainer import train
    from diffusers_vsdm.trainer.bridge import train_bridge

    if method.startswith("SB"):
        bridge = train_bridge(config)
        pipeline, seconds = bridge.pipeline, bridge.start_seconds + bridge.seconds
        per_step = bridge.seconds / (config.bridge_steps * 2 * config.bridge_stages)
    else:
        result = train(config)
        pipeline = BridgePipeline(result.pipeline.unet, result.pipeline.scheduler, result.pipeline.normalizer)
        seconds, per_step = result.seconds, result.seconds / config.max_train_steps
    return pipeline, {"seconds": seconds, "seconds per step": per_step}


def run_toy(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train and measure one model."""
    from diffusers_vsdm.data import sample_toy
    from diffusers_vsdm.trainer.bridge import BridgeConfig
    from diffusers_vsdm.trainer.bridge_report import evaluate_bridge

    problem, method, seed = job
    methods = METHODS | EXTRA.get(problem, {})
    settings: dict[str, Any] = {"max_train_steps": STEPS, "seed": seed, "num_likelihood_samples": 0}
    if problem in BETWEEN:
        settings |= methods[method] | BETWEEN[problem] | {"ddpm_beta_schedule": "brownian"}
    else:
        settings |= {"dataset_name": problem, "standardize": True} | methods[method]
    config = BridgeConfig(**settings)
    pipeline, times = trained(config, method)
    metrics = evaluate_bridge(config, pipeline)[0] | times
    if problem == "8gaussians":
        data = sample_toy(problem, LIKELIHOODS, torch.Generator().manual_seed(99))
        started = time.perf_counter()
        found = pipeline.log_likelihood(data)
        metrics["nll seconds"] = time.perf_counter() - started
        truth = eight_gaussians().log_prob(data)
        bound = pipeline.likelihood_bound(data, generator=torch.Generator().manual_seed(98)).total
        for name, value in (("nll", -found.value), ("bound", bound)):
            excess = Estimate.of(truth + value)
            metrics |= {f"{name} excess": excess.value, f"{name} excess error": excess.standard_error}
    return {"name": f"{problem}, {method}", "seed": seed, "metrics": metrics, "config": config.public()}


def eight_gaussians() -> GaussianMixture:
    """The toy of this name."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    centers = 2.5 * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(centers, torch.full((2,), 0.18**2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def brownian(epsilon: float) -> dict[str, Any]:
    """Of variance epsilon."""
    return {"ddpm_beta_schedule": "brownian", "sigma_max": epsilon**0.5}


def ornstein_uhlenbeck(epsilon: float) -> dict[str, Any]:
    """The power law with 2 sinh(g_T / 2) = epsilon, rising from a tenth of its mean."""
    total = 2 * math.asinh(epsilon / 2)
    beta_min = total / 10
    return {"beta_power": POWER, "beta_min": beta_min, "beta_max": beta_min + (1 + POWER) * (total - beta_min)}


TRANSPORTS = {
    f"d = {d}, epsilon {epsilon}{name}": (d, epsilon, reference)
    for name, reference in (("", brownian), (", VP", ornstein_uhlenbeck))
    for d in DIMENSIONS
    for epsilon in EPSILONS
}


def toys() -> list[tuple[str, str]]:
    """Problems and methods; joint training, which is slow, on one toy."""
    jobs = [(toy, method) for toy in TOYS for method in METHODS if toy == TOYS[0] or "joint" not in method]
    jobs += [(problem, method) for problem in BETWEEN for method in HALF_BRIDGES]
    return jobs + [(problem, method) for problem, methods in EXTRA.items() for method in methods]


def run_transport(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train one model between the ends of an entropic transport, and compare its plan."""
    from diffusers_vsdm.data import TOYS as known
    from diffusers_vsdm.trainer.bridge import BridgeConfig
    from diffusers_vsdm.trainer.bridge_report import evaluate_bridge

    problem, method, seed = job
    dimension, epsilon, reference_process = TRANSPORTS[problem]
    transport = EntropicTransport.draw(dimension, epsilon)

    def source(n: int, generator: torch.Generator | None) -> torch.Tensor:
        return torch.randn(n, dimension, generator=generator)

    def target(n: int, generator: torch.Generator | None) -> torch.Tensor:
        return transport.sample(source(n, generator), generator)

    known |= {"target": target}
    settings = {"num_likelihood_samples": 0, "num_eval_samples": LIKELIHOODS // 5, "seed": seed}
    settings |= {"dataset_name": "target", "prior_type": "standard", "prediction_type": "edm"}
    config = BridgeConfig(**(settings | reference_process(epsilon) | TRANSPORT_METHODS[method]))
    pipeline, times = trained(config, method)
    generator = torch.Generator().manual_seed(1000 + seed)
    rows, others = source(ROWS, generator), source(ENDS, generator)
    reference = target(REFERENCE, generator)
    starts = torch.cat([rows.repeat_interleave(COLUMNS, 0), others])
    with torch.no_grad():
        ends = pipeline.process().arrive(starts, -1, generator)

    def compared(ends: torch.Tensor) -> dict[str, float]:
        given, over_all = ends.split([ROWS * COLUMNS, ENDS])
        return unexplained_variance(transport, rows, given.reshape(ROWS, COLUMNS, dimension), over_all, reference)

    floor = compared(transport.sample(starts, generator))
    metrics = compared(ends) | {f"{name} floor": value for name, value in floor.items()} | times
    metrics |= evaluate_bridge(config, pipeline)[0]
    points = reference[: LIKELIHOODS // 5]
    likelihood = pipeline.log_likelihood(points, "exact" if dimension == 2 else "rademacher", generator)
    bound = pipeline.likelihood_bound(points, generator=generator)
    metrics |= {"nll": -float(likelihood.value.mean()), "bound": float(bound.total.mean())}
    return {"name": f"{problem}, {method}", "seed": seed, "metrics": metrics, "config": config.public()}


def transports() -> list[tuple[str, str]]:
    """Problems and methods; joint training at last."""
    jobs = [(problem, method) for problem in TRANSPORTS for method in TRANSPORT_METHODS]
    return sorted(jobs, key=lambda job: "joint" in job[1])


def run_gaussian(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train a bridge from a Gaussian to N(0, I), and compare its forward drift with that of the one in closed form."""
    from diffusers_vsdm.bridges import GaussianSchrodingerBridge
    from diffusers_vsdm.data import TOYS as known
    from diffusers_vsdm.trainer import train
    from diffusers_vsdm.trainer.bridge import FORWARD, BridgeConfig, BridgeTrainer

    problem, method, seed = job
    mean, covariance = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(COVARIANCE, dtype=torch.float64)

    def draw(mean: torch.Tensor, covariance: torch.Tensor, n: int, generator: Any) -> torch.Tensor:
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (mean + noise @ torch.linalg.cholesky(covariance).mT).float()

    known |= {problem: lambda n, generator: draw(mean, covariance, n, generator)}
    settings = {"dataset_name": problem, "prior_type": "standard", "num_likelihood_samples": 0, "seed": seed}
    config = BridgeConfig(**(settings | ornstein_uhlenbeck(1) | GAUSSIAN_METHODS[method]))
    start = train(config)
    trainer = BridgeTrainer(config, start.pipeline)
    if "turning" in method:
        _turn(trainer.sides[FORWARD])
    process = trainer.train().process()
    exact = GaussianSchrodingerBridge(mean, covariance, float(process.g[-1]))
    generator, sums = torch.Generator().manual_seed(1000), torch.zeros(3, dtype=torch.float64)
    for g, k, width in zip(process.g, process.times, torch.diff(process.g), strict=False):
        x = draw(*exact.marginal(g), ENDS, generator)
        matrix, shift = exact.forward_score(g)
        truth = x.double() @ matrix.mT + shift
        with torch.no_grad():
            mine = process.control(x, k, 1).double()
        sums += width * torch.stack([(mine - truth).square(), truth.square(), mine.square()]).sum(2).mean(1)
    with torch.no_grad():
        ends, controls = process.run(draw(mean, covariance, ENDS, generator), 1, generator)
    end_mean, end_covariance = moments(ends[-1])
    own = 0.5 * (torch.diff(process.g) @ controls.double().square().sum(2).mean(1))
    metrics = {
        "relative error": float((sums[0] / sums[1]).sqrt()),
        "control energy": float(own),
        "of the bridge": float(sums[1] / 2),
        "forward end": float(bures_wasserstein(end_mean, end_covariance, 0 * mean, torch.eye(2).double()).sqrt()),
        "seconds": start.seconds + trainer.seconds,
    }
    return {"name": f"{problem}, {method}", "seed": seed, "metrics": metrics, "config": config.public()}


def _turn(side: Any) -> None:
    """Teach a forward network to turn the plane, whatever the time."""
    network, generator = side.network, torch.Generator().manual_seed(0)
    optimizer, turn = torch.optim.Adam(network.parameters(), 1e-3), TURNING * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    for _ in range(1000):
        x = 2 * torch.randn(512, 2, generator=generator)
        k = torch.randint(network.config["num_train_timesteps"], (512,), generator=generator)
        loss = (network(x, k).sample - x @ turn).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for shadow, parameter in zip(side.ema.shadow_params, network.parameters(), strict=True):
        shadow.copy_(parameter.detach())


def gaussians() -> list[tuple[str, str]]:
    """The problem and the methods."""
    return [("a Gaussian", method) for method in GAUSSIAN_METHODS]


STUDIES = {
    "toys": (toys, run_toy),
    "transport": (transports, run_transport),
    "gaussian": (gaussians, run_gaussian),
}


def main() -> None:
    """Run a study, on all cores, and write its record."""
    from diffusers_vsdm.trainer.report import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="those whose problem and method hold this")
    arguments = parser.parse_args()
    make, run = STUDIES[arguments.study]
    path = RESULTS / f"bridges_{arguments.study}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(old["name"], old["seed"]) for old in runs}  # a change of settings wants the record deleted
    jobs = [(*job, seed) for seed in arguments.seeds for job in make() if arguments.only in ", ".join(job)]
    jobs = [job for job in jobs if (f"{job[0]}, {job[1]}", job[2]) not in done]
    command = f"python -m benchmarks.bridges {arguments.study}"
    for found in run_all(run, jobs):
        runs.append(found)
        print(found["name"], found["seed"], {k: round(v, 4) for k, v in found["metrics"].items()}, flush=True)
        path.write_text(json.dumps({"command": command, "versions": versions(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
