"""The variance-exploding process, against EDM's formulas written out by hand, and against Gaussians."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.training_utils import compute_snr

from diffusers_vsdm import AdaptiveDiagonalDrift, MLPModel, StochasticApproximation, VSDMPipeline, VSDMScheduler
from diffusers_vsdm.likelihood import flow_log_likelihood
from diffusers_vsdm.objectives import likelihood_bound
from diffusers_vsdm.schedulers import scheduling_vsdm
from diffusers_vsdm.schedulers.grids import TIME_GRIDS
from diffusers_vsdm.schedulers.parameterization import PARAMETERIZATIONS
from diffusers_vsdm.solvers import SOLVERS
from diffusers_vsdm.trainer import TrainingConfig, loop, train
from diffusers_vsdm.trainer.report import evaluate, flow_paths, write_report

from .problems import EXPLODING, run, scheduler_for
from .test_trainer import TINY as trainer_tiny


SHAPE = (4, 3)


def edm_sigmas(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Eq. 5 of Karras et al., and the data."""
    i = np.arange(n) / (n - 1)
    sigmas = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigmas, 0.0)


def edm_sampler(denoise, x, sigmas, second_order):
    """Algorithm 1 of Karras et al. without churn; Euler's method in sigma if not `second_order`."""
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        if second_order and following > 0:
            slope = 0.5 * (slope + (euler - denoise(euler, following)) / following)
        x = x + (following - sigma) * slope
    return x


def denoise(x, sigma):
    """Any denoiser: not linear, and one that depends on sigma."""
    return torch.tanh(0.7 * x / (1 + sigma)) + 0.1 * math.log(1 + sigma)


def sample(scheduler, x):
    for k in scheduler.timesteps:
        a, s = scheduler.marginal_scales(x, k)
        x0 = denoise(x, float(s))
        x = scheduler.step(scheduler.parameterization.target(x0, (x - a * x0) / s, a, s), k, x).prev_sample
    return x


# The table ---------------------------------------------------------------------------------------------------


def test_the_table_is_edm_s():
    scheduler = VSDMScheduler.from_variance_exploding()
    assert len(scheduler) == 1000 and scheduler.config["clip_sample"] is False
    np.testing.assert_allclose(scheduler.integrated_beta.sqrt(), edm_sigmas(1000)[-2::-1], rtol=1e-12)
    assert scheduler.init_noise_sigma == 80.0 and scheduler.integrated_beta[0] == 0.002**2  # to the last bit
    assert scheduler.mean_lambda == 0 and scheduler.is_variance_exploding
    k = torch.tensor([0, 500, 999])
    g = torch.cat([torch.zeros(1), scheduler.integrated_beta])
    torch.testing.assert_close(scheduler.beta_at(k).double(), 1000 * (g[k + 1] - g[k]), rtol=1e-6, atol=0)


def test_x_t_is_data_and_noise_of_size_sigma():
    scheduler = VSDMScheduler.from_variance_exploding(num_train_timesteps=50)
    x0, eps, k = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 20, 48, 49])
    sigma = scheduler.integrated_beta[k].sqrt().float()[:, None]
    torch.testing.assert_close(scheduler.add_noise(x0, eps, k), x0 + sigma * eps, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.get_velocity(x0, eps, k), eps - sigma * x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scheduler.get_score(eps, k, x0), -eps / sigma)
    between = scheduler.marginal_scales(x0, torch.tensor([20.5]))[1]  # log g is linear between two times
    expected = scheduler.integrated_beta[[20, 21]].log().mean().exp().sqrt()
    torch.testing.assert_close(between.squeeze().double(), expected, rtol=1e-6, atol=0)


def test_betas_are_those_of_the_same_signal_to_noise_ratios():
    """What training scripts of others ask for (min-SNR); no beta is rounded to 1."""
    scheduler = VSDMScheduler.from_variance_exploding()
    k = torch.arange(1000)
    torch.testing.assert_close(
        compute_snr(scheduler, k).double(), 1 / scheduler.integrated_beta, rtol=2e-2, atol=0
    )  # which computes 1 - alphas_cumprod in float32
    assert ((scheduler.betas > 0) & (scheduler.betas < 1)).all()
    expected = torch.cumprod(1 - scheduler.betas.double(), 0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_follows_float32(solver, dtype, monkeypatch):
    def noise(shape, generator, dtype, **place):  # one stream, whatever the type
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    monkeypatch.setattr(scheduling_vsdm, "randn_tensor", noise)
    outputs = []
    scheduler = VSDMScheduler.from_variance_exploding(solver=solver, num_train_timesteps=100)
    for kind in (torch.float32, dtype):
        scheduler.set_timesteps(20)
        x = scheduler.sample_prior(SHAPE, generator=torch.Generator().manual_seed(0)).to(kind)
        generator = torch.Generator().manual_seed(1)
        for k in scheduler.timesteps:
            sigma = scheduler.integrated_beta_at(k).sqrt()
            x = scheduler.step((x.double() / (1 + sigma**2).sqrt()).to(kind), k, x, generator=generator).prev_sample
            assert x.dtype == kind and x.isfinite().all()
        outputs.append(x.float())
    assert (outputs[0] - outputs[1]).abs().max() < 6 * torch.finfo(dtype).eps * outputs[0].abs().max()
    noised = scheduler.add_noise(torch.ones(SHAPE, dtype=dtype), torch.ones(SHAPE, dtype=dtype), torch.tensor([99]))
    assert noised.dtype == dtype and float(noised[0, 0]) == pytest.approx(81, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "sigmas", [[], [0.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, math.inf], [1.0, math.nan], [1e-200, 1.0]]
)
def test_bad_tables_are_refused(sigmas):
    with pytest.raises(ValueError, match="`trained_sigmas` must be positive and finite"):
        VSDMScheduler(trained_sigmas=sigmas)


@pytest.mark.parametrize(
    "arguments",
    [{"sigma_min": 0}, {"sigma_max": 0.001}, {"rho": 0}, {"num_train_timesteps": 1}, {"sigma_min": math.nan}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, rho > 0"):
        VSDMScheduler.from_variance_exploding(**arguments)


def test_two_tables_are_one_too_many(caplog):
    for other in ({"trained_betas": [0.1, 0.2]}, {"rescale_betas_zero_snr": True}):
        with pytest.raises(ValueError, match="`trained_sigmas` is a table of its own"):
            VSDMScheduler(trained_sigmas=[1.0, 2.0], **other)
    logger = diffusers.utils.logging.get_logger("diffusers_vsdm.schedulers.scheduling_vsdm")
    logger.addHandler(caplog.handler)
    try:
        assert len(VSDMScheduler(trained_sigmas=np.array([1.0, 2.0], dtype=np.float32))) == 2
        assert "`trained_sigmas` has 2 entries" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


# Sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", list(PARAMETERIZATIONS))
@pytest.mark.parametrize("solver, second_order", [("ddim", False), ("heun", True)])
def test_samples_are_those_of_edm_s_sampler(solver, second_order, prediction_type):
    """At EDM's own steps, which are between training times."""
    scheduler = VSDMScheduler.from_variance_exploding(
        solver=solver, time_grid="karras", prediction_type=prediction_type, num_train_timesteps=1000
    )
    scheduler.set_timesteps(18)
    x = scheduler.init_noise_sigma * torch.randn(SHAPE, dtype=torch.float64)
    expected = edm_sampler(denoise, x, edm_sigmas(18), second_order)
    torch.testing.assert_close(sample(scheduler, x), expected, rtol=1e-4, atol=1e-4)  # log g is piecewise linear


def test_steps_in_a_row_are_edm_s():
    """One step of `ddim`, to the rounding: x + (sigma' - sigma) eps."""
    scheduler = VSDMScheduler.from_variance_exploding(solver="ddim")
    scheduler.set_timesteps(timesteps=[999, 640, 3])
    x, eps = 80 * torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    _ = scheduler.init_noise_sigma
    sigma = scheduler.integrated_beta.sqrt()
    for k, following in ((999, sigma[640]), (640, sigma[3]), (3, 0.0)):
        output = scheduler.step(eps, k, x)
        torch.testing.assert_close(output.prev_sample, x + (following - sigma[k]) * eps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output.pred_original_sample, x - sigma[k] * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver, stock", [("ddim", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler)])
def test_solvers_are_those_of_diffusers(solver, stock):
    """Which have the same process, x_0 + sigma eps, in sigmas of their own."""
    theirs = stock(use_karras_sigmas=True)
    theirs.set_timesteps(12)
    sigmas = theirs.sigmas[theirs.sigmas > 0].unique().tolist()
    ours = VSDMScheduler(trained_sigmas=sigmas, num_train_timesteps=12, solver=solver, clip_sample=False)
    ours.set_timesteps(12)
    samples = []
    for scheduler in (theirs, ours):
        x = sigmas[-1] * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        levels = theirs.sigmas if solver == "ddim" else theirs.sigmas[: len(theirs.timesteps)]
        _ = scheduler.init_noise_sigma
        for k, sigma in zip(scheduler.timesteps, levels.tolist(), strict=False):
            scheduler.scale_model_input(x, k)
            x = scheduler.step((x - denoise(x, sigma)) / sigma, k, x).prev_sample
        samples.append(x)
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("time_grid", [None, *TIME_GRIDS])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_and_grid_arrives_at_the_data(solver, time_grid):
    """From N(0, sigma_max^2), where exact x_T have the data's mean and variance too: a difference of 1 in 80."""
    scheduler = VSDMScheduler.from_variance_exploding(solver=solver, time_grid=time_grid)
    scheduler.set_timesteps(200)
    problem, n = EXPLODING, 4000
    x = scheduler.sample_prior((n, 3), generator=torch.Generator().manual_seed(0)).double()
    x = run(scheduler, problem, x, generator=torch.Generator().manual_seed(1))
    assert ((x.mean(0) - problem.mean) / problem.variance.sqrt()).abs().max() < 4 / n**0.5 + 0.05
    first_order_in_g = 0.5 if solver == "euler" else 0.15
    assert (x.var(0) / problem.variance - 1).abs().max() < 4 * (2 / n) ** 0.5 + first_order_in_g


@pytest.mark.parametrize("solver", SOLVERS)
def test_point_masses_are_reached_from_any_prediction(solver):
    for prediction_type in PARAMETERIZATIONS:
        scheduler = VSDMScheduler.from_variance_exploding(solver=solver, prediction_type=prediction_type)
        scheduler.set_timesteps(20)
        data, x = torch.full(SHAPE, 0.7), scheduler.sample_prior(SHAPE, generator=torch.Generator().manual_seed(0))
        for k in scheduler.timesteps:
            a, s = scheduler.marginal_scales(x, k)
            x = scheduler.step(scheduler.parameterization.target(data, (x - data) / s, a, s), k, x).prev_sample
        # an explicit step in g leaves half of the noise, where others leave none
        tolerance = 0.2 if solver == "euler" else 1e-3
        torch.testing.assert_close(x, data, rtol=0, atol=tolerance)


# Prior and drift ---------------------------------------------------------------------------------------------


def test_the_prior_stands_at_the_first_time_of_a_run():
    scheduler = VSDMScheduler.from_variance_exploding()
    scheduler.set_timesteps(timesteps=[700, 300])
    sigma = float(scheduler.integrated_beta[700].sqrt())
    assert scheduler.init_noise_sigma == pytest.approx(sigma, rel=1e-12)
    x = scheduler.sample_prior((20_000, 3), generator=torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(sigma, rel=0.02)
    assert float(scheduler.prior().std) == 80.0
    standard = VSDMScheduler.from_brownian(0.3, 10, prior_type="standard")
    standard.set_timesteps(5)
    assert standard.init_noise_sigma == 1 == float(standard.prior().std)
    marginal = scheduler_for(EXPLODING, prior_type="marginal").prior()
    torch.testing.assert_close(marginal.mean, EXPLODING.mean)
    torch.testing.assert_close(marginal.std, (6400 + EXPLODING.variance).sqrt())


def test_likelihoods_are_those_of_gaussians():
    """Of the flow's samples at the first time; the bound of an exact score is tight in the mean."""
    problem, scheduler = EXPLODING, scheduler_for(EXPLODING, prior_type="marginal")

    def score(x, k):
        return problem.score(x.double(), scheduler.integrated_beta_at(k).reshape(-1, 1)).to(x.dtype)

    generator = torch.Generator().manual_seed(0)
    x = problem.mean + problem.variance.sqrt() * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    std = (problem.variance + scheduler.integrated_beta[0]).sqrt()
    expected = torch.distributions.Normal(problem.mean, std).log_prob(x).sum(1)
    found = flow_log_likelihood(score, scheduler, x.float()).value
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    bound = likelihood_bound(score, scheduler, x.float(), 64, generator).total
    off = bound + expected
    assert abs(float(off.mean())) < 4 * float(off.std()) / len(x) ** 0.5


def test_noise_of_unit_size_warns():
    scheduler = VSDMScheduler.from_variance_exploding()
    scheduler.set_timesteps(5)
    x = torch.randn(SHAPE)
    with pytest.warns(UserWarning, match="did not come from this process's prior"):
        scheduler.step(x, 999, x)


@pytest.mark.parametrize("basis, shape", [("dct", (3, 8, 8)), ("identity", (3, 8, 8)), ("dense", (5,))])
def test_fitted_moments_leave_the_process_alone(basis, shape):
    data = 3 + torch.randn(500, *shape)
    scheduler = VSDMScheduler.from_variance_exploding(sigma_max=2.0)
    if basis == "dense":
        scheduler.set_drift(AdaptiveDiagonalDrift(shape, basis=basis))
        scheduler.drift.set_lambda(0.0)
    scheduler.fit_moments(data, basis=basis)
    scheduler.fit_moments(data, basis=basis)  # as often as one likes, while lambda is one number
    assert scheduler.mean_lambda == 0 and scheduler.config["prior_type"] == "marginal"
    start = scheduler.sample_prior((500, *shape), generator=torch.Generator().manual_seed(0))
    assert float(start.mean()) == pytest.approx(3, abs=0.1) and float(start.var()) == pytest.approx(5, rel=0.1)
    scheduler.drift.set_lambda(torch.linspace(0, 1, 5) if basis == "dense" else 2.0)
    if basis == "dense":
        with pytest.raises(ValueError, match="before lambda is learned"):
            scheduler.fit_moments(data)


@pytest.mark.parametrize("basis, num_times", [("identity", None), ("dense", None), ("identity", 50)])
def test_lambda_0_is_set_saved_and_loaded(basis, num_times, tmp_path):
    drift = AdaptiveDiagonalDrift((3,), basis=basis, num_times=num_times)
    drift.set_lambda(0.0)
    drift.save_file(tmp_path / "drift.safetensors")
    loaded = AdaptiveDiagonalDrift.load_file(tmp_path / "drift.safetensors")
    assert (loaded.lam == 0).all() and loaded.digest() == drift.digest()
    with pytest.raises(ValueError, match="`drift.set_lambda"):
        drift.step(torch.zeros_like(drift.lam_polyak), 0.1)
    # and it is the process that there is without a drift
    scheduler = VSDMScheduler.from_variance_exploding(num_train_timesteps=50, sigma_max=5.0)
    x, eps, k = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 10, 30, 49])
    expected = scheduler.add_noise(x, eps, k)
    scheduler.set_drift(drift)
    torch.testing.assert_close(scheduler.add_noise(x, eps, k), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scheduler.init_noise_sigma.expand(3), torch.full((3,), 5.0))


def test_a_singular_matrix_is_a_drift():
    drift = AdaptiveDiagonalDrift((2,), basis="dense")
    drift.set_lambda(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(drift.lam.sort().values, torch.tensor([0.0, 2.0]).double(), rtol=0, atol=1e-12)
    assert (drift.lam >= 0).all()
    with pytest.raises(ValueError, match="not negative"):
        drift.set_lambda(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


# Stochastic approximation ------------------------------------------------------------------------------------


def mean_ratio(lam, v, total):
    r"""-E[score x] over the backward SDE from N(0, g_T) with the exact score of N(0, v), averaged over dg.

    The variance W of the backward process and the forward one's, V, obey dV/dg = 1 - lam V and
    d(W - V)/dg = -(lam - 2 / V) (W - V), hence W / V = 1 + (g_T / V_T - 1) (V / V_T) exp(-lam (g_T - g)).
    """
    at_end = math.exp(-lam * total) * v - math.expm1(-lam * total) / lam
    decay = math.exp(-lam * total)
    integral = decay * (v - 1 / lam) - math.expm1(-lam * total) / (lam**2 * total)
    return 1 + (total / at_end - 1) * integral / at_end


def test_the_closed_form_is_the_integral():
    lam, v, total = 0.3, 4.0, 2.0
    g = torch.linspace(0, total, 20_001, dtype=torch.float64)
    variance = torch.exp(-lam * g) * v - torch.expm1(-lam * g) / lam
    w = variance[-1] * 0 + total
    ratios = []
    for i in range(len(g) - 1, 0, -1):  # Euler's method, backwards
        ratios.append(float(w / variance[i]))
        w = w + (g[i] - g[i - 1]) * (lam * w - 2 * w / variance[i] + 1)
    assert mean_ratio(lam, v, total) == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)


@pytest.mark.parametrize("total, settles", [(2.0, True), (100.0, False)])
def test_lambda_goes_where_theory_says(total, settles):
    """With sigma_max of the data's size there is a root; with a wide one lambda sinks towards EDM's own 0."""
    v, zeta, sigma_max = torch.tensor([4.0, 9.0]).double(), 0.75, math.sqrt(total)
    scheduler = VSDMScheduler.from_variance_exploding(0.02, sigma_max, num_train_timesteps=60)
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(1 / scheduler.integrated_beta[-1])
    scheduler.set_drift(drift)
    approximation = StochasticApproximation(
        drift, scheduler.integrated_beta, zeta=zeta, variance_exploding=True, num_trajectories=2000
    )

    def score(x, k):
        a, s = scheduler.marginal_scales(x.double(), k)
        return (-x.double() / (a**2 * v + s**2)).float()

    for _ in range(60):
        approximation.update(score)
    lam = drift.average("polyak")
    if not settles:
        assert (drift.lam * total < 0.05).all()
        return
    for found, variance in zip(lam.tolist(), v.tolist(), strict=True):
        low, high = 1e-6, 50.0  # -E[score x] rises with lambda up to its root
        assert mean_ratio(low, variance, total) < zeta < mean_ratio(high, variance, total)
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if mean_ratio(middle, variance, total) < zeta else (low, middle)
        assert found == pytest.approx(low, rel=0.1)


def test_the_standard_prior_is_the_reference_s_own():
    starts = []
    scheduler = VSDMScheduler.from_variance_exploding(num_train_timesteps=20)
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(0.01)
    approximation = StochasticApproximation(
        drift, scheduler.integrated_beta, variance_exploding=True, num_trajectories=4000
    )
    approximation.update(lambda x, k: starts.append(x) or -x / 6400)
    assert len(starts) == 20
    assert float(starts[0].std()) == pytest.approx(80, rel=0.03) and float(starts[0].mean().abs()) < 4


def test_the_inner_product_has_the_reference_s_a():
    """A = -lambda / 2, since there is no drift at A = 0."""
    scheduler = VSDMScheduler.from_variance_exploding(sigma_max=2.0, num_train_timesteps=20)
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor([0.1, 0.4]))
    lam = drift.lam.clone()
    approximation = StochasticApproximation(
        drift, scheduler.integrated_beta, zeta_placement="inner_product", variance_exploding=True, clip=100.0
    )
    output = approximation.update(lambda x, k: -x / 4)
    torch.testing.assert_close(output.gradient, 1 + 0.75 * output.score_x - 0.25 * lam / 2 * output.x_x)


def test_lambda_0_is_refused_before_anything_is_simulated():
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor([0.0, 1e-4]))
    g = VSDMScheduler.from_variance_exploding(num_train_timesteps=20).integrated_beta
    approximation = StochasticApproximation(drift, g, variance_exploding=True)
    with pytest.raises(ValueError, match=r"start above it, with `drift.set_lambda\(...\)`"):
        approximation.update(lambda x, k: pytest.fail("simulated"))
    # the other update is additive
    ipf = StochasticApproximation(drift, g, variance_exploding=True, update="ipf", zeta=1.0, num_trajectories=8)
    assert (ipf.update(lambda x, k: -x / 6400).lam > 0).all()


# It travels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_drift", [False, True])
def test_save_and_load_keep_every_bit(with_drift, tmp_path):
    scheduler = VSDMScheduler.from_variance_exploding(0.0123, 77.7, num_train_timesteps=64, solver="heun")
    if with_drift:
        scheduler.set_drift(AdaptiveDiagonalDrift((3,)))
        scheduler.drift.set_lambda(torch.tensor([0.0, 1e-5, 1e-3]))
    scheduler.save_pretrained(tmp_path)
    x = torch.randn(SHAPE)
    for other in (VSDMScheduler.from_pretrained(tmp_path), VSDMScheduler.from_config(scheduler.config)):
        assert torch.equal(other.integrated_beta, scheduler.integrated_beta)
        assert torch.equal(torch.as_tensor(other.init_noise_sigma), torch.as_tensor(scheduler.init_noise_sigma))
        for s in (scheduler, other):
            s.set_timesteps(5)
        assert torch.equal(scheduler.step(x, 63, x).prev_sample, other.step(x, 63, x).prev_sample)
    assert not VSDMScheduler.from_config(scheduler.config, trained_sigmas=None).is_variance_exploding


def test_stock_schedulers_warn_and_are_refused(caplog):
    scheduler = VSDMScheduler.from_variance_exploding(num_train_timesteps=20)
    logger = diffusers.utils.logging.get_logger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        stock = DDIMScheduler.from_config(scheduler.config)
        assert "trained_sigmas" in caplog.text and "not expected" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    network = MLPModel(2, 20, 4, 1)
    with pytest.raises(ValueError, match="DDIMScheduler whose configuration belongs to a table of sigmas"):
        VSDMPipeline(network, stock)
    back = VSDMScheduler.from_config(stock.config)
    assert torch.equal(back.integrated_beta, scheduler.integrated_beta)
    # what is read from a file, which a stock class may have written
    again = VSDMScheduler.from_config(json.loads(stock.to_json_string()))
    assert again.is_variance_exploding and not VSDMScheduler.from_config(DDPMScheduler().config).is_variance_exploding


def test_brownian_times_are_close_at_both_ends():
    scheduler = VSDMScheduler.from_brownian(1.5, num_train_timesteps=50)
    steps = torch.diff(scheduler.integrated_beta, prepend=torch.zeros(1))
    assert float(scheduler.integrated_beta[-1]) == pytest.approx(2.25)
    torch.testing.assert_close(steps, steps.flip(0))
    assert steps[0] < 1e-3 * 2.25 and steps.max() < 0.04 * 2.25
    for bad in ({"sigma_max": 0.0}, {"num_train_timesteps": 1}):
        with pytest.raises(ValueError, match="Brownian"):
            VSDMScheduler.from_brownian(**bad)


# Training ----------------------------------------------------------------------------------------------------

TINY = trainer_tiny | {"ddpm_beta_schedule": "ve", "sigma_max": 10.0, "num_eval_samples": 100, "standardize": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "sgm"},
        {"baseline": "sgm", "basis": "dense", "prediction_type": "sample", "weighting": "likelihood"},
        {"num_likelihood_samples": 8, "time_sampling": "log_snr"},
        {"basis": "dense", "sa_prior": "marginal", "zeta_placement": "inner_product"},
        {"lambda_varies": True, "zeta": 1.0, "sa_update": "ipf"},
    ],
)
def test_training_over_the_exploding_table(settings, tmp_path):
    config = TrainingConfig(**TINY | settings, output_dir=str(tmp_path))
    result = train(config)
    scheduler = result.pipeline.scheduler
    assert scheduler.is_variance_exploding and scheduler.config["clip_sample"] is False
    learned = "baseline" not in settings
    assert (result.lambdas[0] == (1 / scheduler.integrated_beta[-1] if learned else 0)).all()
    assert (scheduler.drift.lam > 0).all() == learned and len(result.lambdas) == (6 if learned else 1)
    record = write_report(config, result)
    assert math.isfinite(record["metrics"]["w2_standardized"])
    loaded = VSDMPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.scheduler.drift.lam, scheduler.drift.lam) and loaded.scheduler.is_variance_exploding
    card = (tmp_path / "README.md").read_text()
    assert "sigma from 0.002 to 10.0" in card and "--ddpm_beta_schedule ve" in card


def test_the_marginal_prior_is_the_data_s_own():
    trainer = loop.Trainer(TrainingConfig(**TINY | {"standardize": False}, baseline="sgm", dataset_name="gaussian"))
    prior = trainer.scheduler.prior()
    torch.testing.assert_close(prior.mean, trainer.drift.data_mean)
    torch.testing.assert_close(prior.std, (100 + trainer.drift.data_variance).sqrt())


def test_flow_paths_end_near_the_data():
    """Euler's steps in sigma; those in g, of the same number, leave too much noise."""
    problem = EXPLODING
    scheduler = scheduler_for(problem, prior_type="marginal")

    class Exact(MLPModel):
        def forward(self, sample, timestep, return_dict=True):
            return (problem.eps(sample.double(), scheduler.integrated_beta[int(timestep)]).to(sample.dtype),)

    paths, _ = flow_paths(VSDMPipeline(Exact(3, 100, 4, 1), scheduler), 2000, 99)
    ratio = paths[-1].double().var(0) / problem.variance
    assert ((ratio > 0.8) & (ratio < 1.2)).all(), ratio


@pytest.mark.parametrize(
    "settings, message",
    [({"sigma_min": 0.0}, "`sigma_min`"), ({"sigma_max": 0.001}, "`sigma_max`"), ({"sigma_min": 10.0}, "`sigma_max`")],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**TINY | settings)


def test_metrics_of_a_run():
    result = train(TrainingConfig(**TINY | {"sigma_max": 80.0}))
    metrics, paths = evaluate(result.pipeline, "spiral-8y", 100, 99)
    assert paths.isfinite().all() and metrics["num_function_evaluations"] == 99
