import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from diffusers_vsdm import process

from .problems import ANISOTROPIC, DiagonalGaussian


LAMBDAS = (0.0, 1e-9, 0.3, 1.0, 7.0, 20.0)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


lams = st.one_of(st.just(0.0), st.floats(1e-12, 20.0))
gs = st.floats(1e-6, 40.0)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_transition_agrees_with_the_matrix_exponential_of_eq_14(lam):
    g = 1.7
    block = torch.tensor([[-0.5 * lam * g, g], [0.0, 0.5 * lam * g]], dtype=torch.float64)
    # applied to (Sigma_0, I) = (0, 1)
    c, h = torch.matrix_exp(block) @ f64([0.0, 1.0])
    torch.testing.assert_close(process.variance(f64(lam), f64(g)), c / h, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.mean_scale(f64(lam), f64(g)), torch.matrix_exp(block)[0, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_transition_solves_the_moment_equations_12(lam):
    beta_min, beta_max, power = 0.1, 10.0, 1.7

    def rates(t, y):
        beta = float(process.power_law_beta(f64(t), beta_min, beta_max, power))
        return [-0.5 * beta * lam * y[0], -beta * lam * y[1] + beta]

    solution = solve_ivp(rates, (0, 1), [1.0, 0.0], rtol=1e-11, atol=1e-13).y[:, -1]
    g = process.power_law_integrated_beta(f64(1.0), beta_min, beta_max, power)
    np.testing.assert_allclose(float(process.mean_scale(f64(lam), g)), solution[0], rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(float(process.variance(f64(lam), g)), solution[1], rtol=1e-8)


def test_transition_agrees_with_simulated_paths():
    lam, steps, n = f64([0.0, 0.5, 2.0, 8.0]), 2000, 20_000
    g, generator = 1.5, torch.Generator().manual_seed(0)
    dg = g / steps
    x = torch.full((n, 4), 2.0, dtype=torch.float64)
    for _ in range(steps):
        x = x - 0.5 * lam * x * dg + dg**0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    variance = process.variance(lam, f64(g))
    z_mean = (x.mean(0) - 2 * process.mean_scale(lam, f64(g))) / (variance / n).sqrt()
    z_variance = (x.var(0) / variance - 1) / math.sqrt(2 / n)
    # Euler's own bias, lam * dg / 4 of the variance, is below 0.2 standard errors
    assert z_mean.abs().max() < 4 and z_variance.abs().max() < 4


@given(lam=lams, g=gs, share=st.floats(0.01, 0.99))
def test_transitions_compose(lam, g, share):
    lam, g = f64(lam), f64(g)
    first, second = share * g, g - share * g
    a = process.mean_scale(lam, first) * process.mean_scale(lam, second)
    s2 = process.mean_scale(lam, second) ** 2 * process.variance(lam, first) + process.variance(lam, second)
    torch.testing.assert_close(a, process.mean_scale(lam, g), rtol=1e-9, atol=0)
    torch.testing.assert_close(s2, process.variance(lam, g), rtol=1e-9, atol=0)


@given(lam=lams, g=gs)
def test_variance_is_accurate_to_rounding_also_near_lambda_zero(lam, g):
    import mpmath

    with mpmath.workdps(60):
        exact = mpmath.mpf(g) if lam == 0 else (1 - mpmath.exp(-mpmath.mpf(lam) * g)) / mpmath.mpf(lam)
    np.testing.assert_allclose(float(process.variance(f64(lam), f64(g))), float(exact), rtol=4e-15)


@given(lam=lams, g=gs, share=st.floats(0.01, 0.99), x0=st.floats(-5, 5), x=st.floats(-5, 5))
def test_posterior_is_bayes_rule(lam, g, share, x0, x):
    lam, g, g_next = f64(lam), f64(g), f64(share * g)
    on_x, on_x0, variance = process.posterior(lam, g, g_next)
    # x_r given x_0 is the prior, x_t given x_r the likelihood: precisions add
    a_r, s2_r = process.mean_scale(lam, g_next), process.variance(lam, g_next)
    a, s2 = process.mean_scale(lam, g - g_next), process.variance(lam, g - g_next)
    precision = 1 / s2_r + a**2 / s2
    mean = (a_r * x0 / s2_r + a * x / s2) / precision
    torch.testing.assert_close(variance, 1 / precision, rtol=1e-8, atol=0)
    torch.testing.assert_close(on_x * x + on_x0 * x0, mean, rtol=1e-7, atol=1e-9)


def test_neutral_process_is_ddpm():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    g = process.integrated_beta(betas)
    torch.testing.assert_close(process.mean_scale(f64(1.0), g), alpha_bar.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.variance(f64(1.0), g), 1 - alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(process.discrete_betas(g), betas, rtol=1e-9, atol=0)


def test_power_law_integrates_its_rate():
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    numeric = torch.trapezoid(process.power_law_beta(t, 0.1, 20.0, 1.7), t)
    torch.testing.assert_close(process.power_law_integrated_beta(f64(1.0), 0.1, 20.0, 1.7), numeric, rtol=1e-7, atol=0)


def test_limits_at_infinite_time():
    infinite = f64(math.inf)
    assert process.mean_scale(f64(2.0), infinite) == 0 and process.variance(f64(2.0), infinite) == 0.5
    assert process.mean_scale(f64(0.0), infinite) == 1 and process.variance(f64(0.0), infinite) == math.inf


def test_drifts_of_eq_17_and_18_transport_the_marginals():
    """Both reverse-time processes must leave every marginal of the Gaussian in place: check dm/dg and dv/dg."""
    problem = ANISOTROPIC
    g, h = f64(1.3), 1e-5
    mean, variance = problem.moments(g)
    x = mean + variance.sqrt()  # one standard deviation from the mean
    mean_slope = (problem.moments(g + h)[0] - problem.moments(g - h)[0]) / (2 * h)
    std_slope = (problem.moments(g + h)[1].sqrt() - problem.moments(g - h)[1].sqrt()) / (2 * h)
    flow = process.ode_drift(problem.lam, x, problem.score(x, g))
    torch.testing.assert_close(flow, mean_slope + std_slope, rtol=1e-6, atol=1e-8)
    # the backward SDE's drift b obeys dv/dg = 2 cov(b, x) - 1 on a Gaussian, backward noise adding a unit per g
    slope = process.sde_drift(problem.lam, x, problem.score(x, g)) - process.sde_drift(
        problem.lam, mean, problem.score(mean, g)
    )
    variance_slope = (problem.moments(g + h)[1] - problem.moments(g - h)[1]) / (2 * h)
    torch.testing.assert_close(2 * slope * variance.sqrt() - 1, variance_slope, rtol=1e-6, atol=1e-8)


@given(lam=lams, g=gs, share=st.floats(0.01, 0.99), x=st.floats(-5, 5), eps=st.floats(-3, 3))
def test_ancestral_step_is_the_posterior_at_the_predicted_data(lam, g, share, x, eps):
    lam, g, g_next = f64(lam), f64(min(g, 20 / (lam + 0.1))), f64(share * min(g, 20 / (lam + 0.1)))
    a, s = process.mean_scale(lam, g), process.std(lam, g)
    on_x, on_x0, variance = process.posterior(lam, g, g_next)
    mean, same = process.ancestral_step(lam, g, g_next, f64(x), process.conditional_score(f64(eps), s))
    torch.testing.assert_close(mean, on_x * x + on_x0 * (x - s * eps) / a, rtol=1e-6, atol=1e-8)
    assert same == variance


def test_marginal_moments_are_the_gaussians():
    mean, variance = process.marginal_moments(ANISOTROPIC.lam, f64(0.9), ANISOTROPIC.mean, ANISOTROPIC.variance)
    expected = DiagonalGaussian.moments(ANISOTROPIC, f64(0.9))
    torch.testing.assert_close((mean, variance), expected, rtol=1e-12, atol=0)
