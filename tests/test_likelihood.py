import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vsdm import (
    AdaptiveDiagonalDrift,
    DataNormalizer,
    MLPModel,
    VSDMPipeline,
    VSDMScheduler,
    likelihood,
    process,
)
from diffusers_vsdm.bases import RotatedBasis
from diffusers_vsdm.discrete import integrated_beta_at, training_time_at
from diffusers_vsdm.likelihood import bits_per_dimension, dequantize, flow_log_likelihood
from diffusers_vsdm.objectives import likelihood_bound
from diffusers_vsdm.schedulers.prior import GaussianPrior

from .problems import ANISOTROPIC, benchmarks, scheduler_for


@given(st.just(0.0) | st.floats(1e-9, 20), st.floats(1e-5, 40))
def test_time_of_log_snr_is_the_inverse(lam, g):
    lam, g = torch.tensor([lam, g], dtype=torch.float64)
    found = process.time_of_log_snr(lam, process.log_snr(lam, g))
    # beyond lam g = 30 the variance has no digit left that depends on time; the signal has
    torch.testing.assert_close(found, g, rtol=1e-9, atol=0)


@given(st.lists(st.floats(1e-4, 1), min_size=2, max_size=20), st.floats(0, 1))
def test_training_time_at_is_the_inverse(steps, share):
    table = torch.tensor(steps, dtype=torch.float64).cumsum(0)
    k = torch.tensor(share * (len(steps) - 1), dtype=torch.float64)
    torch.testing.assert_close(training_time_at(integrated_beta_at(k, table), table), k, rtol=0, atol=1e-9)


def test_the_prior_is_the_gaussian_that_it_says():
    torch.manual_seed(0)
    d, rotation = 4, torch.linalg.qr(torch.randn(4, 4).double()).Q
    factor = torch.linalg.cholesky(torch.eye(d).double() + 0.5)
    mean, std, x = torch.randn(d).double(), torch.rand(d).double() + 0.5, torch.randn(10, d).double()
    narrow, normal = torch.rand(d).double() + 0.1, torch.distributions.MultivariateNormal
    for covariance, prior in (
        (torch.diag(std**2), GaussianPrior(mean, std, RotatedBasis(rotation))),
        (factor @ factor.T, GaussianPrior(mean, std, RotatedBasis(rotation), factor)),
    ):
        law = normal(mean @ rotation, rotation.T @ covariance @ rotation)
        torch.testing.assert_close(prior.log_prob(x), law.log_prob(x))
        samples = prior.sample(torch.randn(200_000, d).double())
        torch.testing.assert_close(samples.T.cov(), law.covariance_matrix, rtol=0, atol=0.03)
        truth = [
            torch.distributions.kl_divergence(normal(y, torch.diag(narrow**2)), normal(mean, covariance)) for y in x
        ]
        torch.testing.assert_close(prior.divergence_from(x, narrow), torch.stack(truth))


def gaussian_score(scheduler, problem):
    return lambda x, k: problem.score(x, scheduler.integrated_beta_at(k)[:, None]).to(x)


@pytest.mark.parametrize("kind", ["exact", "rademacher"])
def test_gaussian_data_have_their_own_likelihood(kind):
    """A Jacobian that is diagonal is known exactly to random signs too, but for rounding."""
    scheduler = scheduler_for(ANISOTROPIC, prior_type="marginal")
    x = ANISOTROPIC.mean + ANISOTROPIC.variance.sqrt() * torch.randn(200, 3).double()
    found = flow_log_likelihood(gaussian_score(scheduler, ANISOTROPIC), scheduler, x, kind, rtol=1e-7, atol=1e-7)
    mean, variance = ANISOTROPIC.moments(scheduler.integrated_beta[0])
    truth = torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).sum(1)
    torch.testing.assert_close(found.value, truth, rtol=0, atol=2e-4)
    assert 20 < found.num_function_evaluations < 500


def test_the_likelihood_of_a_mixture_on_ten_thousand_points():
    """At most 0.02 nats from the truth in the mean; t0 is DDPM's first training time, g = 1e-4."""
    problem = benchmarks()["8 gaussians, d = 2"]
    scheduler = VSDMScheduler()
    drift = AdaptiveDiagonalDrift((2,))
    scheduler.set_drift(drift)
    x = problem.sample(10_000, torch.Generator().manual_seed(0))

    def score(x, k):
        g = scheduler.integrated_beta_at(k[:1])
        return -problem.eps(x, g) / process.std(drift.lam, g)

    found = flow_log_likelihood(score, scheduler, x)
    difference = found.value - problem.log_prob(x)
    assert abs(float(difference.mean())) < 0.02
    assert float(difference.abs().max()) < 0.5  # and no point is far off


@pytest.mark.parametrize("lam", [torch.tensor([0.5, 2.0]), torch.linspace(0.5, 2, 100)[:, None] * torch.ones(2)])
def test_rates_per_dimension_and_in_time(lam):
    """The exact score of whatever process there is: the same data have the same likelihood."""
    scheduler = VSDMScheduler.from_power_law(prior_type="marginal")
    drift = AdaptiveDiagonalDrift((2,), num_times=100 if lam.ndim == 2 else None)
    drift.set_lambda(lam)
    drift.data_mean.copy_(torch.tensor([1.0, -1.0]))
    drift.data_variance.copy_(torch.tensor([0.3, 2.0]))
    scheduler.set_drift(drift)
    data = torch.distributions.Normal(drift.data_mean, drift.data_variance.sqrt())
    x = data.sample((100,))

    def score(x, k):
        a, s = scheduler.marginal_scales(x, k)
        return -(x - a * drift.data_mean) / (a**2 * drift.data_variance + s**2)

    found = flow_log_likelihood(score, scheduler, x)
    a, s = scheduler.marginal_scales(x[:1], 0)
    law = torch.distributions.Normal(a * drift.data_mean, (a**2 * drift.data_variance + s**2).sqrt())
    torch.testing.assert_close(found.value, law.log_prob(x).sum(1), rtol=0, atol=2e-3)


class PerFrequency(torch.nn.Module):
    """A perfect network for Gaussian images with variances per frequency."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, x, k):
        a, s = self.scheduler.marginal_scales(x, k)
        drift = self.scheduler.drift
        basis = drift.basis(dtype=x.dtype)
        score = -basis.to_basis(x) / (a**2 * drift.data_variance + s**2)
        return basis.from_basis(score).to(x)


def test_images_with_a_lambda_per_frequency():
    shape = (3, 4, 4)
    drift = AdaptiveDiagonalDrift(shape, basis="dct")
    generator = torch.Generator().manual_seed(0)
    drift.set_lambda(torch.rand(shape, generator=generator).double() + 0.5)
    drift.data_variance.copy_(torch.rand(shape, generator=generator) + 0.1)
    scheduler = VSDMScheduler(prior_type="marginal")
    scheduler.set_drift(drift)
    network = PerFrequency(scheduler)
    basis = drift.basis()
    x = basis.from_basis(drift.data_variance.sqrt() * torch.randn(20, *shape, generator=generator).double())
    found = flow_log_likelihood(network, scheduler, x, "exact")
    g = scheduler.integrated_beta[0]
    variance = process.marginal_moments(drift.lam, g, drift.data_mean, drift.data_variance)[1]
    truth = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(basis.to_basis(x)).flatten(1).sum(1)
    torch.testing.assert_close(found.value, truth, rtol=0, atol=0.01)
    estimate = flow_log_likelihood(network, scheduler, x, "rademacher", torch.Generator().manual_seed(0))
    error = estimate.value - truth
    assert 1e-3 < float(error.std()) and abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(20)
    # the bound of a perfect network is above by what its decoder does not know
    x = basis.from_basis(drift.data_variance.sqrt() * torch.randn(4000, *shape, generator=generator).double())
    bound = likelihood_bound(network, scheduler, x, 2, generator).total
    a, s2 = process.mean_scale(drift.lam, g), process.variance(drift.lam, g)
    entropy = 0.5 * (drift.data_variance.log() + 1 + math.log(2 * math.pi)).sum()
    decoder = 0.5 * torch.log1p(s2 / (a**2 * drift.data_variance)).sum()
    assert abs(float(bound.mean() - entropy - decoder)) < 4 * float(bound.std()) / math.sqrt(len(x))


def vector_pipeline(normalizer=None, **settings):
    torch.manual_seed(0)
    scheduler = VSDMScheduler.from_power_law(**settings)
    scheduler.set_drift(AdaptiveDiagonalDrift((2,)))
    return VSDMPipeline(MLPModel(2, 100, 16, 1), scheduler, normalizer)


def test_likelihoods_are_in_the_units_of_the_data():
    """A density integrates to one, whatever the normalizer."""
    normalizer = DataNormalizer((2,))
    normalizer.mean.copy_(torch.tensor([3.0, -1.0]))
    normalizer.std.copy_(torch.tensor([0.5, 4.0]))
    pipeline = vector_pipeline(normalizer, beta_max=2.0)
    sides = [torch.linspace(-8, 8, 161) * s + m for s, m in zip((0.5, 4.0), (3.0, -1.0), strict=True)]
    points = torch.cartesian_prod(*sides)
    density = pipeline.log_likelihood(points).value.exp().reshape(161, 161)
    total = torch.trapezoid(torch.trapezoid(density, sides[1].double()), sides[0].double())
    assert float(total) == pytest.approx(1, abs=1e-3)
    # the bound moves by as much
    plain = vector_pipeline(beta_max=2.0).likelihood_bound(
        normalizer.normalize(points[:5]), 2, torch.Generator().manual_seed(0)
    )
    moved = pipeline.likelihood_bound(points[:5], 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved.total - plain.total, torch.full((5,), math.log(2)).double(), rtol=0, atol=1e-4)


def image_pipeline():
    torch.manual_seed(0)
    network = UNet2DModel(
        8,
        3,
        3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    scheduler = VSDMScheduler()
    scheduler.set_drift(AdaptiveDiagonalDrift((3, 8, 8)))
    return VSDMPipeline(network, scheduler)


def test_images_of_whole_numbers_are_dequantized():
    pipeline = image_pipeline()
    images = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dequantized = dequantize(images, torch.Generator().manual_seed(1))
    assert torch.equal((dequantized * 256).floor().to(torch.uint8), images)
    whole = pipeline.likelihood_bound(images, 1, torch.Generator().manual_seed(1))
    spread = pipeline.likelihood_bound(dequantized, 1)
    torch.testing.assert_close(whole.prior_loss, spread.prior_loss)
    # a point of [0, 1] is one of 256 levels
    torch.testing.assert_close(whole.reconstruction, spread.reconstruction + 192 * math.log(256), rtol=1e-9, atol=0)
    # eight bits for an image of which nothing is known but its range
    assert float(bits_per_dimension(torch.tensor(-192 * math.log(256.0)), 192)) == pytest.approx(8)


def test_clear_errors():
    pipeline = image_pipeline()
    with pytest.raises(ValueError, match=r"in \[0, 1\].*-1 to 1"):
        pipeline.log_likelihood(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8))
    with pytest.raises(ValueError, match="NaN"):
        pipeline.likelihood_bound(torch.full((1, 3, 8, 8), math.nan))
    with pytest.raises(ValueError, match="shape"):
        pipeline.log_likelihood(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="num_times"):
        pipeline.likelihood_bound(torch.zeros(1, 3, 8, 8), 0)
    pipeline.scheduler = VSDMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    for method in (pipeline.log_likelihood, pipeline.likelihood_bound):
        with pytest.raises(ValueError, match="no signal"):
            method(torch.zeros(1, 3, 8, 8))
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="from_config"):
        pipeline.log_likelihood(torch.zeros(1, 3, 8, 8))
    broken = vector_pipeline()
    torch.nn.init.constant_(broken.unet.embed.bias, math.nan)
    for method in (broken.log_likelihood, broken.likelihood_bound):
        with pytest.raises(FloatingPointError, match="not finite"):
            method(torch.zeros(3, 2))


def test_a_network_in_half_precision(monkeypatch):
    """Its rounding is rougher than any fine tolerance: an error that says so, not a solver that never ends."""
    pipeline = vector_pipeline()
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    pipeline.to(torch.bfloat16)
    value = pipeline.log_likelihood(x, rtol=0.03, atol=0.03).value
    assert value.dtype == torch.float64 and value.shape == (1,) and value.isfinite().all()
    monkeypatch.setattr(likelihood, "MOST_STEPS", 50)
    with pytest.raises(FloatingPointError, match="rtol"):
        pipeline.log_likelihood(x, rtol=1e-9, atol=1e-9)
