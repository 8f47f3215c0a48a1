"""What starting from N(0, I) costs a model whose table leaves signal at its last time, and what `fit_moments` mends.

    python -m benchmarks.prior_repair --data FOLDER     # a folder with CIFAR-10 as on the Hub

The table is Stable Diffusion's, a_T = 0.068. The network is perfect: the exact score of 2,000 images of CIFAR-10 at
32x32, as they are and with twice the contrast. Beside N(0, I) and the marginal priors stand offset noise, for a
network that was trained with it, and `rescale_betas_zero_snr`, for the same network and for one that was trained with
the new table. Writes `benchmarks/results/prior_repair.json`.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from diffusers_vsdm import VSDMScheduler, process
from diffusers_vsdm.bases import CosineBasis, cosine_matrix, principal_axes
from diffusers_vsdm.data.images import load_images
from diffusers_vsdm.trainer.report import versions

from .tables import RESULTS


IMAGES, SAMPLES, STEPS, WIDEST = 2000, 1000, 50, 60
OFFSET = 0.1  # of the usual offset noise
SEEDS = (0, 1, 2)
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SAMPLER = {"solver": "dpmsolver++", "timestep_spacing": "trailing"}


class PerfectNetwork:
    """Predicts v exactly for equally likely `images` `(n, C, H, W)`, noised by the table of `scheduler`.

    With an `offset` the noise that it was trained on has that much more standard deviation, common to the pixels of a
    channel.
    """

    def __init__(self, images: Tensor, scheduler: VSDMScheduler, offset: float = 0.0):
        self.flat = images.flatten(1)
        self.widening = (1 + offset**2 * images.shape[-1] * images.shape[-2]) ** 0.5  # of the noise in the means
        self.whitened = self.whiten(images)
        self.squares = self.whitened.square().sum(1)
        self.g = scheduler.integrated_beta

    def whiten(self, x: Tensor) -> Tensor:
        """Coordinates in which the noise is N(0, I)."""
        return (x - (1 - 1 / self.widening) * x.mean((2, 3), keepdim=True)).flatten(1)

    def __call__(self, x: Tensor, k: Tensor) -> Tensor:
        """The network's output at samples `x` and training step `k`."""
        one = torch.ones((), dtype=torch.float64)
        a, s = process.mean_scale(one, self.g[int(k)]), process.std(one, self.g[int(k)])
        logits = (a * (self.whiten(x) @ self.whitened.T) - 0.5 * a**2 * self.squares) / s**2
        x0 = (torch.softmax(logits, dim=1) @ self.flat).reshape(x.shape)
        eps = (x - a * x0) / s
        return (a * eps - s * x0).float()


def frequencies(images: Tensor) -> CosineBasis:
    """The basis in which both measures are taken: principal channel axes and cosines."""
    side = images.shape[-1]
    return CosineBasis(principal_axes(images).float(), cosine_matrix(side).float(), cosine_matrix(side).float())


def measure(samples: Tensor, images: Tensor) -> dict[str, float]:
    """The brightness' standard deviation over the data's, and the Frechet distance over the widest frequencies."""
    basis = frequencies(images)
    x, y = (basis.to_basis(z).flatten(1).double() for z in (samples, images))
    widest = y.var(0).argsort(descending=True)[:WIDEST]
    (mx, cx), (my, cy) = ((z[:, widest].mean(0).numpy(), z[:, widest].T.cov().numpy()) for z in (x, y))
    cross = scipy.linalg.sqrtm(cx @ cy).real
    return {
        "brightness": float(x[:, 0].std() / y[:, 0].std()),
        "frechet": float(np.square(mx - my).sum() + np.trace(cx + cy - 2 * cross)),
    }


def sample(network: PerfectNetwork, scheduler: VSDMScheduler, start: Tensor) -> Tensor:
    """A run of the scheduler."""
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    x = start
    for k in scheduler.timesteps:
        x = scheduler.step(network(x, k), k, x).prev_sample
    return x


def starts(images: Tensor) -> dict[str, Callable[[torch.Generator], Tensor]]:
    """By name, samples of a run with that start."""
    settings = TABLE | SAMPLER | {"prediction_type": "v_prediction"}
    shape = (SAMPLES, *images.shape[1:])
    original = VSDMScheduler(**settings)
    network = PerfectNetwork(images, original)

    def plain(generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator)

    def marginal(basis: str) -> Callable[[torch.Generator], Tensor]:
        scheduler = VSDMScheduler(**settings)
        scheduler.fit_moments(images, basis=basis)
        return lambda generator: sample(network, scheduler, scheduler.sample_prior(shape, generator=generator))

    def offset(generator: torch.Generator) -> Tensor:
        return plain(generator) + OFFSET * torch.randn((*shape[:2], 1, 1), generator=generator)

    rescaled = VSDMScheduler(**settings, rescale_betas_zero_snr=True)
    offsetting = PerfectNetwork(images, original, OFFSET)
    retrained = PerfectNetwork(images, rescaled)
    return {
        "N(0, I)": lambda generator: sample(network, original, plain(generator)),
        "offset noise, retrained network": lambda generator: sample(offsetting, original, offset(generator)),
        "zero terminal SNR, same network": lambda generator: sample(network, rescaled, plain(generator)),
        "zero terminal SNR, retrained network": lambda generator: sample(retrained, rescaled, plain(generator)),
        "marginal per pixel": marginal("identity"),
        "marginal per frequency (fit_moments)": marginal("dct"),
    }


def main() -> None:
    """Both contrasts, every start, every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    arguments = parser.parse_args()
    data = load_images(arguments.data, max_samples=IMAGES)
    images = data.__getitems__(list(range(IMAGES)))
    runs: list[dict[str, Any]] = []
    for contrast, scaled in (("as they are", images), ("twice the contrast", 2 * images)):
        for name, draw in starts(scaled).items():
            for seed in SEEDS:
                metrics = measure(draw(torch.Generator().manual_seed(seed)), scaled)
                runs.append({"name": f"{contrast}: {name}", "seed": seed, "metrics": metrics})
                print(runs[-1], flush=True)
    record = {
        "command": "python -m benchmarks.prior_repair",
        "versions": versions(),
        "configuration": TABLE | SAMPLER | {"images": IMAGES, "samples": SAMPLES, "steps": STEPS, "widest": WIDEST},
        "runs": runs,
    }
    (RESULTS / "prior_repair.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
