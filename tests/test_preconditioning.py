"""The prediction type `edm`: the preconditioning of Karras et al. (2022), with a number for each dimension."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMScheduler
from diffusers_vsdm.objectives import denoising_score_matching

from .problems import ANISOTROPIC, scheduler_for
from .test_bases import EVENT, dct_scheduler


STEPS = torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(0))


@given(st.integers(0, 99), st.floats(0.05, 4.0))
@settings(deadline=None, max_examples=25)
def test_one_number_is_table_1_of_karras_et_al(k, sigma_data):
    """Their c_in, c_skip and c_out in the sigma of x / a, and the weighting that makes every c_out^2 lambda 1."""
    scheduler = VSDMScheduler.from_power_law(prediction_type="edm", sigma_data=sigma_data, solver="ddim")
    x0, eps, output = torch.randn(3, 4, 5).double()
    k = torch.tensor([k])
    x = scheduler.add_noise(x0, eps, k)
    a, s = scheduler.marginal_scales(x0, k)
    y, sigma = x / a, s / a
    total = (sigma**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(scheduler.scale_model_input(x, k), y / total)
    denoised = sigma_data**2 / total**2 * y + sigma * sigma_data / total * output
    torch.testing.assert_close(scheduler.step(output, k, x).pred_original_sample, denoised, rtol=1e-4, atol=1e-5)
    weight = total**2 / (sigma * sigma_data) ** 2
    loss = denoising_score_matching(scheduler, output, x0, eps, k)
    torch.testing.assert_close(loss, (weight * (denoised - x0) ** 2).mean(), rtol=1e-4, atol=1e-6)


def test_input_and_target_have_power_one_in_every_frequency():
    """And the target is what the input does not say, in the linear sense. Pixels do not have this property."""
    scheduler, drift = dct_scheduler(prediction_type="edm")
    basis, n = drift.basis(), 20_000
    x0 = basis.from_basis(drift.data_mean + drift.data_variance.sqrt() * torch.randn(n, *EVENT).double())
    eps, k = torch.randn_like(x0), torch.full((n,), 40)
    x = scheduler.add_noise(x0, eps, k)
    seen = basis.to_basis(scheduler.scale_model_input(x, k))
    a, s = scheduler.marginal_scales(x0, k)
    target = scheduler.parameterization.target(basis.to_basis(x0), basis.to_basis(eps), a, s)
    for power, expected in (((seen**2).mean(0), 1.0), ((target**2).mean(0), 1.0), ((seen * target).mean(0), 0.0)):
        torch.testing.assert_close(power, torch.full_like(power, expected), rtol=0, atol=0.07)
    assert ((basis.from_basis(seen) ** 2).mean(0) - 1).abs().max() > 0.3


def test_a_neutral_drift_keeps_its_basis_for_the_network():
    """With one lambda the process needs no basis, but the numbers of the network belong to one."""
    scheduler, drift = dct_scheduler(prediction_type="edm", solver="ddim")
    drift.set_lambda(1.0)
    basis = drift.basis()
    x0, eps = torch.randn(2, 5, *EVENT).double()
    k = torch.tensor([30])
    x = scheduler.add_noise(x0, eps, k)
    a, s = scheduler.marginal_scales(x0, k)
    output = basis.from_basis(scheduler.parameterization.target(basis.to_basis(x0), basis.to_basis(eps), a, s))
    assert float(denoising_score_matching(scheduler, output, x0, eps, k)) < 1e-9
    torch.testing.assert_close(scheduler.step(output, k, x).pred_original_sample, x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scheduler.get_score(output, k, x), -eps / s, rtol=1e-5, atol=1e-5)


def test_known_dimensions_are_not_asked_for():
    """A pixel that is 0 in all data: nothing is divided by its power, and the prediction there is 0."""
    scheduler = scheduler_for(ANISOTROPIC, prediction_type="edm", solver="ddim")
    scheduler.drift.data_mean[1] = scheduler.drift.data_variance[1] = 0.0
    x0, eps = torch.randn(2, 32, 3).double()
    x0[:, 1] = 0
    x = scheduler.add_noise(x0, eps, STEPS)
    assert scheduler.scale_model_input(x, STEPS).isfinite().all()
    assert denoising_score_matching(scheduler, torch.randn(32, 3).double(), x0, eps, STEPS).isfinite()
    prediction = scheduler.step(torch.randn(32, 3).double(), 50, x).pred_original_sample
    assert (prediction[:, 1] == 0).all()


@pytest.mark.parametrize("solver", ["ddim", "heun", "trig", "dpmsolver++"])
def test_half_precision_stays_near(solver):
    """Where lambda g is 40 and no signal is left, in float16 as in float64."""
    scheduler = scheduler_for(ANISOTROPIC, prediction_type="edm", solver=solver)
    scheduler.drift.set_lambda(torch.tensor([8.0, 1.0, 0.5]))
    scheduler.set_timesteps(10)
    start, ends = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).half(), {}
    for dtype in (torch.float64, torch.float16):
        x = start.to(dtype)
        scheduler.set_timesteps(10)
        for k in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, k)
            assert seen.dtype == dtype
            x = scheduler.step(torch.tanh(seen), k, x).prev_sample
        ends[dtype] = x.double()
    error = (ends[torch.float16] - ends[torch.float64]).abs().max() / ends[torch.float64].abs().max()
    assert x.dtype == torch.float16 and error < 12 * torch.finfo(torch.float16).eps


def test_without_moments_the_data_are_images():
    x, k = torch.randn(2, 3, 4, 4), torch.tensor([10, 900])
    default, given = (VSDMScheduler(prediction_type="edm", sigma_data=value) for value in (None, 0.5))
    assert torch.equal(default.scale_model_input(x, k), given.scale_model_input(x, k))
    assert VSDMScheduler.from_config(given.config).config["sigma_data"] == 0.5


def test_moments_that_a_network_was_trained_with_are_kept():
    scheduler = VSDMScheduler(prediction_type="edm")
    with pytest.raises(ValueError, match="sigma_data"):
        scheduler.fit_moments(torch.randn(100, 3, 4, 4))
    with pytest.raises(ValueError, match="sigma_data"):
        VSDMScheduler(prediction_type="edm", sigma_data=0.0)
    scheduler = VSDMScheduler(prediction_type="edm", sigma_data=0.5)
    x, k = torch.randn(2, 3, 4, 4), torch.tensor([10, 900])
    before = scheduler.scale_model_input(x, k)
    scheduler.fit_moments(torch.randn(100, 3, 4, 4))
    assert torch.equal(scheduler.scale_model_input(x, k), before)
    scheduler.set_drift(AdaptiveDiagonalDrift((3, 4, 4), basis="dct"))
    assert torch.equal(scheduler.scale_model_input(x, k), before)
