from dataclasses import replace

import pytest
import torch

from diffusers_vsdm import VSDMScheduler
from diffusers_vsdm.objectives import TIME_SAMPLINGS, WEIGHTINGS, denoising_score_matching, time_probabilities
from diffusers_vsdm.schedulers.parameterization import PARAMETERIZATIONS

from .problems import ANISOTROPIC, scheduler_for


K = torch.randint(5, 95, (64,), generator=torch.Generator().manual_seed(0))


def batch():
    x0, eps = torch.randn(64, 3).double(), torch.randn(64, 3).double()
    return x0, eps


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "simple"])
def test_weighted_loss_does_not_depend_on_what_the_network_predicts(weighting):
    """The same error in the score costs the same under every prediction type."""
    x0, eps = batch()
    wrong_eps = eps + 0.1 * torch.randn_like(eps)
    losses = []
    for name in PARAMETERIZATIONS:
        scheduler = scheduler_for(ANISOTROPIC, prediction_type=name)
        network = scheduler.parameterization
        x = scheduler.add_noise(x0, eps, K)
        a, s = scheduler.marginal_scales(x0, K)
        output = network.target((x - s * wrong_eps) / a, wrong_eps, a, s)  # consistent with x
        # a consistent pair (x0, eps) is what an output stands for: check, then measure
        torch.testing.assert_close(network.eps(output, x, a, s), wrong_eps, rtol=1e-4, atol=1e-5)
        losses.append(float(denoising_score_matching(scheduler, output, x0, eps, K, weighting)))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)


def test_score_weighting_is_eq_16_as_printed():
    x0, eps = batch()
    scheduler = scheduler_for(ANISOTROPIC)
    _, s = scheduler.marginal_scales(x0, K)
    prediction = eps + torch.randn_like(eps)
    printed = ((-eps / s - scheduler.get_score(prediction, K, scheduler.add_noise(x0, eps, K))) ** 2).mean()
    loss = denoising_score_matching(scheduler, prediction, x0, eps, K, "score")
    torch.testing.assert_close(loss, printed, rtol=1e-9, atol=0)
    rates = scheduler.beta_at(K)[:, None]
    likelihood = denoising_score_matching(scheduler, prediction, x0, eps, K, "likelihood")
    torch.testing.assert_close(likelihood, (rates * (prediction - eps) ** 2 / s**2).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_that_of_hang_et_al(name):
    """min(SNR, 5) on the error of the data, and what that is on the error of the noise and of v."""
    x0, eps = batch()
    scheduler = scheduler_for(ANISOTROPIC, prediction_type=name)
    a, s = scheduler.marginal_scales(x0, K)
    snr = (a / s) ** 2
    assert snr.min() < 1 and snr.max() > 20
    per_unit = {"epsilon": s / a, "sample": torch.ones_like(s), "v_prediction": s / (a**2 + s**2)}  # of x0
    target = scheduler.parameterization.target(x0, eps, a, s)
    loss = denoising_score_matching(scheduler, target + 1, x0, eps, K, "min_snr")
    torch.testing.assert_close(loss, (snr.clamp(max=5) * per_unit[name] ** 2).mean())


def test_simple_is_the_mean_squared_error_of_the_target():
    x0, eps = batch()
    scheduler = scheduler_for(ANISOTROPIC, prediction_type="v_prediction")
    target = scheduler.get_velocity(x0, eps, K)
    assert float(denoising_score_matching(scheduler, target, x0, eps, K)) < 1e-10
    assert float(denoising_score_matching(scheduler, target + 2, x0, eps, K)) == pytest.approx(4.0, rel=1e-5)


def test_the_minimiser_is_the_score():
    """Regressing on the noise finds the marginal's score, by least squares on a Gaussian."""
    scheduler = scheduler_for(ANISOTROPIC)
    n, k = 400_000, torch.tensor([60])
    x0 = ANISOTROPIC.mean + ANISOTROPIC.variance.sqrt() * torch.randn(n, 3).double()
    eps = torch.randn(n, 3).double()
    x = scheduler.add_noise(x0, eps, k)
    slope = ((x - x.mean(0)) * (eps - eps.mean(0))).mean(0) / x.var(0)
    g = scheduler.integrated_beta[60]
    one, zero = torch.ones(3).double(), torch.zeros(3).double()
    torch.testing.assert_close(slope, ANISOTROPIC.eps(one, g) - ANISOTROPIC.eps(zero, g), rtol=0.02, atol=0.003)


def test_shapes_that_would_broadcast_are_refused():
    x0, eps = batch()
    with pytest.raises(ValueError, match="one shape"):
        denoising_score_matching(scheduler_for(ANISOTROPIC), eps[:, :1], x0, eps, K)


def test_unknown_weighting():
    x0, eps = batch()
    with pytest.raises(ValueError, match="weighting"):
        denoising_score_matching(scheduler_for(ANISOTROPIC), eps, x0, eps, K, "edm")


@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_times_are_drawn_as_often_as_the_objective_says(sampling):
    """A mean over drawn times is the mean over all times with these weights."""
    scheduler = scheduler_for(ANISOTROPIC)
    p = time_probabilities(scheduler, sampling)
    assert p.shape == (100,) and float(p.sum()) == pytest.approx(1)
    lam, g = ANISOTROPIC.lam.mean(), scheduler.integrated_beta
    growth = torch.diff(g, prepend=g[:1] * 0) * lam / -torch.expm1(-lam * g)
    log_sigma = torch.log(torch.expm1(lam * g) / lam) / 2
    normal = torch.exp(-((log_sigma + 1.2) ** 2) / (2 * 1.2**2))
    slope = {"uniform": torch.ones(100).double(), "log_snr": growth, "log_normal": growth * normal}
    torch.testing.assert_close(p, slope[sampling] / slope[sampling].sum(), rtol=1e-9, atol=0)


def test_uniform_in_the_log_snr():
    """So many of the times lie between two of them as there is log-SNR between."""
    scheduler = VSDMScheduler()
    g = scheduler.integrated_beta
    share, log_snr = time_probabilities(scheduler, "log_snr").cumsum(0), -torch.expm1(g).log()
    covered = (log_snr[100] - log_snr[100:]) / (log_snr[100] - log_snr[-1])
    torch.testing.assert_close((share[100:] - share[100]) / (share[-1] - share[100]), covered, rtol=0, atol=5e-3)


def test_importance_sampling_of_times_is_the_likelihood_weighting():
    """Drawn uniformly in the log-SNR, weighted by 1, is drawn uniformly, weighted by beta / s^2: up to a constant."""
    torch.manual_seed(0)
    scheduler = scheduler_for(replace(ANISOTROPIC, lam=torch.full((3,), 0.8, dtype=torch.float64)))
    everywhere = torch.arange(100)
    x0, eps = torch.randn(100, 3).double(), torch.randn(100, 3).double()
    wrong = eps + torch.randn(100, 3).double()
    p = time_probabilities(scheduler, "log_snr")
    errors = torch.stack(
        [
            denoising_score_matching(scheduler, wrong[k : k + 1], x0[k : k + 1], eps[k : k + 1], everywhere[k : k + 1])
            for k in everywhere
        ]
    )
    weighted = denoising_score_matching(scheduler, wrong, x0, eps, everywhere, "likelihood")
    _, s = scheduler.marginal_scales(x0, everywhere)
    constant = (scheduler.beta_at(everywhere)[:, None] / s**2).mean()
    assert float((p * errors).sum() * constant) == pytest.approx(float(weighted), rel=2e-4)  # rates are in float32


def test_no_log_snr_without_a_signal():
    scheduler = VSDMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="at its last"):
        time_probabilities(scheduler, "log_snr")
    with pytest.raises(ValueError, match="time_sampling"):
        time_probabilities(scheduler, "cosine")
