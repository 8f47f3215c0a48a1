"""Drifts with a lambda for each training time, against constant ones, recursions and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm import AdaptiveDiagonalDrift, StochasticApproximation, VSDMScheduler, process
from diffusers_vsdm.bridges import GaussianSchrodingerBridge
from diffusers_vsdm.discrete import DiscreteProcess
from diffusers_vsdm.solvers import SOLVERS


N = 100
MEAN, VARIANCE = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.3, 6.0]).double()


def varying_drift(lam, basis="identity"):
    drift = AdaptiveDiagonalDrift((2,), basis=basis, num_times=len(lam))
    drift.set_lambda(lam)
    drift.data_mean.copy_(MEAN)
    drift.data_variance.copy_(VARIANCE)
    return drift


def rising():
    t = torch.arange(1, N + 1, dtype=torch.float64)[:, None] / N
    return torch.cat([0.4 + 1.5 * t, 2.5 - 2 * t], dim=1)


def scheduler_with(drift, **settings):
    scheduler = VSDMScheduler.from_power_law(beta_max=8.0, **settings)
    scheduler.set_drift(drift)
    return scheduler


def test_the_variance_solves_its_equation():
    """ds^2/dg = 1 - lambda s^2 in the limit of many times: METHOD's two cases, to four digits."""
    n = 20_000
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    lam = torch.stack([0.5 + 2 * (t - 0.5 / n), 2.5 - 2 * (t - 0.5 / n)], dim=1)
    log_a, s2 = process.piecewise_scales(lam, t)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for i, rate in enumerate((lambda u: 0.5 * u + u**2, lambda u: 2.5 * u - u**2)):  # the integral of lambda
        total = rate(grid[-1])
        expected = torch.trapezoid(torch.exp(-(total - rate(grid))), grid)
        assert float(s2[-1, i]) == pytest.approx(float(expected), rel=1e-6)
        assert float(log_a[-1, i]) == pytest.approx(-0.5 * float(total), rel=1e-6)


@given(
    st.lists(st.floats(1e-4, 30.0), min_size=1, max_size=12),
    st.floats(1e-3, 20.0),
)
@settings(deadline=None, max_examples=60)
def test_the_unit_rate_has_the_same_scales(rates, total):
    lam = torch.tensor(rates, dtype=torch.float64)[:, None]
    g = total * torch.arange(1, len(rates) + 1, dtype=torch.float64) / len(rates)
    log_a, s2 = process.piecewise_scales(lam, g)
    unit, scale = process.at_unit_rate(log_a, s2)
    one = torch.ones(())
    torch.testing.assert_close(scale * process.std(one, unit), s2.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(scale * process.mean_scale(one, unit), log_a.exp(), rtol=1e-7, atol=1e-300)


@given(st.floats(-1.0, N - 1.0), st.floats(0.05, 5.0))
@settings(deadline=None, max_examples=60)
def test_constant_rates_are_a_special_case_between_times_too(k, lam):
    g = 3.0 * torch.arange(1, N + 1, dtype=torch.float64) / N
    constant = DiscreteProcess(torch.tensor([lam], dtype=torch.float64), g)
    varying = DiscreteProcess(torch.full((N, 1), lam, dtype=torch.float64), g, varies=True)
    for expected, value in zip(*(p.scales(torch.tensor([k]).double()) for p in (constant, varying)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def exact_output(scheduler, x, k):
    """The noise that an exact network predicts for Gaussian data."""
    a, s = (scale.double() for scale in scheduler.marginal_scales(x, k))
    return s * (x - a * MEAN) / (a**2 * VARIANCE + s**2)


def run(scheduler, x, steps, **kwargs):
    scheduler.set_timesteps(steps)
    for k in scheduler.timesteps:
        x = scheduler.step(exact_output(scheduler, x, k), k, x, **kwargs).prev_sample
    return x


DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_rates_step_as_one_does(solver):
    """Every solver, at a constant lambda given once and given for each time."""
    lam = torch.tensor([0.6, 2.0]).double()
    constant = AdaptiveDiagonalDrift((2,))
    constant.set_lambda(lam)
    constant.data_mean.copy_(MEAN)
    constant.data_variance.copy_(VARIANCE)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    # Euler's methods step x / c, which is another discretisation of the same process: near each other in many steps
    steps, tolerance = (N, 0.1) if solver.startswith("euler") else (12, 1e-6)
    one, other = (
        run(scheduler_with(d, solver=solver), x, steps, generator=torch.Generator().manual_seed(1))
        for d in (constant, varying_drift(lam.expand(N, 2)))
    )
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_the_flow_is_the_exact_one(solver):
    """For Gaussian data z = (x - a m) / sqrt(a^2 v + s^2) stays as it is; errors fall with the steps."""
    scheduler = scheduler_with(varying_drift(rising()), solver=solver)
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(10)
    z = torch.randn(200, 2, generator=generator).double()
    a, s = (scale.double() for scale in scheduler.marginal_scales(z, N - 1))
    x = a * MEAN + (a**2 * VARIANCE + s**2).sqrt() * z
    expected = MEAN + VARIANCE.sqrt() * z
    errors = [float((run(scheduler, x, steps) - expected).square().mean().sqrt()) for steps in (10, 40)]
    assert errors[1] < 0.2 and errors[1] < max(0.5 * errors[0], 1e-10)


@pytest.mark.parametrize("solver", ["ddpm", "sde-dpmsolver++", "euler-maruyama"])
def test_sampling_has_the_law_of_the_data(solver):
    scheduler = scheduler_with(varying_drift(rising()), solver=solver, prior_type="marginal")
    scheduler.set_timesteps(N)
    generator = torch.Generator().manual_seed(0)
    x = scheduler.sample_prior((20_000, 2), generator=generator, dtype=torch.float64)
    x = run(scheduler, x, N, generator=generator)
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.06, rtol=0)
    torch.testing.assert_close(x.var(0), VARIANCE, rtol=0.08, atol=0)


def test_saved_and_loaded(tmp_path):
    scheduler = scheduler_with(varying_drift(rising()))
    scheduler.save_pretrained(tmp_path)
    loaded = VSDMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.drift.lam, scheduler.drift.lam) and loaded.drift.num_times == N
    with pytest.raises(ValueError, match="100 training times, the table 50"):
        scheduler_with(varying_drift(rising()), num_train_timesteps=50).add_noise(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])
        )


def test_what_has_no_fixed_point_is_refused():
    drift, g = varying_drift(rising()), torch.arange(1, N + 1) / N
    with pytest.raises(ValueError, match="`zeta`"):
        StochasticApproximation(drift, g, zeta=0.75)
    with pytest.raises(ValueError, match="`num_steps`"):
        StochasticApproximation(drift, g, zeta=1.0, num_steps=50)
    with pytest.raises(ValueError, match="`update`"):
        StochasticApproximation(AdaptiveDiagonalDrift((2,)), g, update="newton")


@pytest.mark.parametrize("prior", ["conditional", "marginal"])
def test_simulation_starts_from_its_prior(prior):
    """Moments by recursion over the intervals; the noise is that of a start at N(0, I)."""
    g = process.power_law_integrated_beta(torch.arange(1, N + 1, dtype=torch.float64) / N, 0.1, 8.0, 1.7)

    def start(prior):
        drift, starts = varying_drift(rising()), []
        approximation = StochasticApproximation(drift, g, zeta=1.0, prior=prior, num_trajectories=8)
        approximation.update(lambda x, k: starts.append(x) or -x)
        return starts[0]

    mean, variance = (MEAN, VARIANCE) if prior == "marginal" else (0 * MEAN, 0 * VARIANCE)
    for lam, dg in zip(rising(), torch.diff(g, prepend=g.new_zeros(1)), strict=True):
        decay = torch.exp(-lam * dg)
        mean, variance = decay.sqrt() * mean, decay * variance + (1 - decay) / lam
    expected = mean + variance.sqrt() * start("standard")
    torch.testing.assert_close(start(prior).double(), expected, rtol=1e-5, atol=1e-5)


def learn_bridge(update, stages, num_trajectories, seed=0):
    """IPF with the exact score of Gaussian data: relative error of A_t in L2(dg), after each stage."""
    g = torch.arange(1, N + 1, dtype=torch.float64) / N
    covariance = torch.tensor([[1.0, 1.0], [1.0, 5.0]]).double()
    variance, axes = torch.linalg.eigh(covariance)
    drift = AdaptiveDiagonalDrift((2,), basis="dense", num_times=N)
    drift.rotation.copy_(axes.T)
    drift.data_variance.copy_(variance)
    bridge = GaussianSchrodingerBridge(torch.zeros(2), covariance, 1.0)
    matrices, _ = bridge.forward_score(g - 0.5 / N)  # lambda is that of an interval
    exact = (axes.T @ matrices @ axes).diagonal(dim1=1, dim2=2)
    approximation = StochasticApproximation(
        drift, g, zeta=1.0, update=update, num_trajectories=num_trajectories, seed=seed
    )
    errors = []
    for _ in range(stages):
        a, s = DiscreteProcess(drift.lam, g, varies=True).scales(torch.arange(N))
        forward = a**2 * variance + s**2
        approximation.update(lambda x, k, v=forward: -((x.double() @ axes / v[k]) @ axes.T).float())
        error = (1 - drift.lam) / 2 - exact
        errors.append(math.sqrt(float(error.square().sum() / exact.square().sum())))
    return errors


def test_ipf_arrives_at_the_schroedinger_bridge():
    errors = learn_bridge("ipf", 5, 65_536)
    assert errors[0] > 0.3 and errors[-1] < 0.05


def test_steps_along_the_gradient_stop_elsewhere():
    """At zeta = 1 every drift that carries the data to the prior is stationary."""
    assert learn_bridge("gradient", 40, 1024)[-1] > 0.1
