"""Problems with known answers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMScheduler, process


@dataclass(frozen=True)
class DiagonalGaussian:
    """Data N(mean, variance) in each dimension under the process with rates `lam`: all is Gaussian, all is known."""

    mean: Tensor
    variance: Tensor
    lam: Tensor

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t, from the Gaussian's own evolution rather than from the package."""
        a = torch.exp(-self.lam * g / 2)
        noise = torch.where(self.lam == 0, g, (1 - torch.exp(-self.lam * g)) / torch.where(self.lam == 0, 1, self.lam))
        return a * self.mean, a**2 * self.variance + noise

    def score(self, x: Tensor, g: Tensor) -> Tensor:
        mean, variance = self.moments(g)
        return -(x - mean) / variance

    def eps(self, x: Tensor, g: Tensor) -> Tensor:
        """What a perfect epsilon network answers."""
        return -process.std(self.lam, g) * self.score(x, g)

    def flow(self, x: Tensor, g: Tensor, g_next: Tensor) -> Tensor:
        """The probability flow's map from time g to g_next: it keeps the standardised coordinate."""
        (mean, variance), (mean_next, variance_next) = self.moments(g), self.moments(g_next)
        return mean_next + (variance_next / variance).sqrt() * (x - mean)

    def posterior(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_0 given x_t, by Gaussian conditioning."""
        a = torch.exp(-self.lam * g / 2)
        mean, variance = self.moments(g)
        gain = self.variance * a / variance
        return self.mean + gain * (x - mean), self.variance - gain * a * self.variance


@dataclass(frozen=True)
class GaussianMixture:
    """Equal parts of N(means[c], variance), under the process with rates `lam`; its score is known, not its flow."""

    means: Tensor  # (components, d)
    variance: Tensor  # (d,)
    lam: Tensor

    def eps(self, x: Tensor, g: Tensor) -> Tensor:
        """What a perfect epsilon network answers at `x`, `(n, d)`."""
        a, noise = process.mean_scale(self.lam, g), process.variance(self.lam, g)
        variance = (a**2 * self.variance + noise).to(x)
        means = (a * self.means).to(x)
        y, m = x / variance.sqrt(), means / variance.sqrt()
        weight = torch.softmax(y @ m.T - 0.5 * (m * m).sum(1), dim=1)
        return noise.sqrt().to(x) * (x - weight @ means) / variance

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the data, `(n,)`."""
        normal = torch.distributions.Normal(self.means[:, None], self.variance.sqrt())
        return torch.logsumexp(normal.log_prob(x.double()).sum(-1), 0) - math.log(len(self.means))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn((n, self.means.shape[1]), generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.variance.sqrt() * noise


def _spectrum(d: int, total: float, power: float) -> Tensor:
    """Variances that fall as those of an image's frequencies; their mean is `total`."""
    v = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    return total * v / v.mean()


def benchmarks() -> dict[str, DiagonalGaussian | GaussianMixture]:
    """With exact scores, at lambda 1, in 2 and in 3072 dimensions; fixed, to compare solvers on."""
    generator = torch.Generator().manual_seed(2026)
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    ring = torch.stack([angle.cos(), 0.5 * angle.sin()], dim=1)
    wide = _spectrum(3072, 0.25, 1.0)
    centres = torch.randn((64, 3072), generator=generator, dtype=torch.float64) * wide.sqrt()
    two = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([1.0, 0.01], dtype=torch.float64)
    return {
        "gaussian, d = 2": DiagonalGaussian(*two, torch.ones(2, dtype=torch.float64)),
        "8 gaussians, d = 2": GaussianMixture(
            ring, torch.tensor([0.01, 0.0025], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        ),
        "gaussian, d = 3072": DiagonalGaussian(torch.zeros_like(wide), wide, torch.ones_like(wide)),
        "64 gaussians, d = 3072": GaussianMixture(centres, 0.1 * wide, torch.ones_like(wide)),
    }


def drawn_benchmarks(seed: int) -> dict[str, DiagonalGaussian | GaussianMixture]:
    """The same four families with drawn parameters, to tell what holds from what is luck on one problem."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(least: float, most: float, n: int = 1) -> Tensor:
        return least + (most - least) * torch.rand(n, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def log_uniform(least: float, most: float) -> Tensor:
        return uniform(math.log(least), math.log(most), 2).exp()

    one = torch.ones(2, dtype=torch.float64)
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4 + uniform(0, torch.pi / 4)
    ring = torch.stack([angle.cos(), uniform(0.3, 1) * angle.sin()], dim=1)
    wide, clustered = (_spectrum(3072, 0.25, float(uniform(0.5, most))) for most in (2.0, 1.5))
    return {
        "gaussian, d = 2": DiagonalGaussian(0.3 * normal(2), log_uniform(0.003, 1.5), one),
        "8 gaussians, d = 2": GaussianMixture(ring, log_uniform(0.001, 0.03), one),
        "gaussian, d = 3072": DiagonalGaussian(torch.zeros_like(wide), wide, torch.ones_like(wide)),
        "64 gaussians, d = 3072": GaussianMixture(
            normal(64, 3072) * clustered.sqrt(), 0.1 * clustered, torch.ones_like(clustered)
        ),
    }


ANISOTROPIC = DiagonalGaussian(
    mean=torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64),
    variance=torch.tensor([0.25, 60.0, 4.0], dtype=torch.float64),
    lam=torch.tensor([0.7, 1.9, 1.0], dtype=torch.float64),
)


EXPLODING = DiagonalGaussian(
    mean=torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64),
    variance=torch.tensor([0.25, 60.0, 4.0], dtype=torch.float64),
    lam=torch.zeros(3, dtype=torch.float64),
)


def scheduler_for(problem: DiagonalGaussian, num_train: int = 100, moments: bool = True, **settings) -> VSDMScheduler:
    """The power-law process, or EDM's if lambda is 0, with the problem's drift and, unless told not to, moments."""
    if problem.lam.any():
        scheduler = VSDMScheduler.from_power_law(0.1, 10.0, 1.7, num_train, clip_sample=False, **settings)
    else:
        scheduler = VSDMScheduler.from_variance_exploding(num_train_timesteps=num_train, **settings)
    if moments or problem.lam.any():
        drift = AdaptiveDiagonalDrift(tuple(problem.lam.shape))
        drift.set_lambda(problem.lam)
        scheduler.set_drift(drift)
    if moments:
        drift.data_mean.copy_(problem.mean)
        drift.data_variance.copy_(problem.variance)
    _ = scheduler.init_noise_sigma  # as pipelines do
    return scheduler


def run(scheduler: VSDMScheduler, problem: DiagonalGaussian, x: Tensor, generator=None, calls=None) -> Tensor:
    """Sample with the perfect network along the scheduler's current timesteps, or the first `calls` of them."""
    scheduler.set_begin_index(0)
    for k in scheduler.timesteps[:calls]:
        eps = problem.eps(x, scheduler.integrated_beta_at(k))
        x = scheduler.step(eps, k, x, generator=generator).prev_sample
    return x
