import math
import statistics

import pytest
import torch

from diffusers_vsdm.solvers import SOLVERS

from .problems import ANISOTROPIC, run, scheduler_for


N, END = 961, 240  # uniform steps from t = 1 to t = 0.25, where the flow is smooth in every solver's own clock
STEPS = (10, 20, 40, 80)


def order_of(errors):
    """Median of the observed orders between successive halvings of the step."""
    return statistics.median(math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False))


def grid(n):
    return list(range(N - 1, END - 1, -(N - 1 - END) // n))


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if not solver.stochastic])
def test_ode_solvers_converge_to_the_exact_flow_with_their_order(name):
    problem = ANISOTROPIC
    scheduler = scheduler_for(problem, N, solver=name)
    start, end = scheduler.integrated_beta[N - 1], scheduler.integrated_beta[END]
    mean, variance = problem.moments(start)
    x = mean + torch.randn(64, 3, dtype=torch.float64) * variance.sqrt()
    exact, scale = problem.flow(x, start, end), problem.moments(end)[1].sqrt()
    errors = []
    for n in STEPS:
        scheduler.set_timesteps(timesteps=grid(n))
        calls = n * SOLVERS[name].calls_per_step
        errors.append(float(((run(scheduler, problem, x, calls=calls) - exact) / scale).square().mean().sqrt()))
    assert abs(order_of(errors) - SOLVERS[name].order) < 0.2, errors


def law_of_samples(scheduler, problem, num_steps):
    """Mean and variance of the sampler's output, exactly: with a Gaussian score every step is affine plus noise."""
    g = scheduler.integrated_beta[int(scheduler.timesteps[0])]
    mean, variance = (moment.clone() for moment in problem.moments(g))
    for k in scheduler.timesteps[:num_steps]:
        g = scheduler.integrated_beta[int(k)]
        points = torch.stack([torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)])
        eps = problem.eps(points, g)
        # antithetic noise: the mean of both runs is the step without noise, half the difference its noise
        up, down = (scheduler.step(eps, int(k), points, generator=_Fixed(sign)).prev_sample for sign in (1.0, -1.0))
        offset, end = (up + down) / 2
        noise = ((up - down) / 2)[0]
        mean, variance = offset + (end - offset) * mean, (end - offset) ** 2 * variance + noise**2
    return mean, variance


class _Fixed:
    """Stands in for a generator: `randn_tensor` is patched to return this constant."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_stochastic_solvers_converge_in_law_with_their_order(name, monkeypatch):
    from diffusers_vsdm.schedulers import scheduling_vsdm

    monkeypatch.setattr(
        scheduling_vsdm,
        "randn_tensor",
        lambda shape, generator, device, dtype: torch.full(shape, generator.value, dtype=dtype),
    )
    problem = ANISOTROPIC
    scheduler = scheduler_for(problem, N, solver=name)
    exact_mean, exact_variance = problem.moments(scheduler.integrated_beta[END])
    errors = []
    for n in STEPS:
        scheduler.set_timesteps(timesteps=grid(n))
        mean, variance = law_of_samples(scheduler, problem, n)
        errors.append(
            float(
                torch.stack([(mean - exact_mean) / exact_variance.sqrt(), variance / exact_variance - 1]).abs().max()
            )
        )
    assert abs(order_of(errors) - SOLVERS[name].order) < 0.2, errors


def test_ddpm_is_exact_where_the_prediction_is():
    """From a point mass of data, the predicted data is right, and one step samples the exact marginal."""
    scheduler = scheduler_for(ANISOTROPIC, solver="ddpm", prediction_type="sample", prior_type="conditional")
    x0 = torch.tensor([0.3, -1.0, 2.0]).expand(200_000, 3)
    scheduler.set_timesteps(timesteps=[99, 40])
    noise = torch.randn(x0.shape)
    x = scheduler.add_noise(x0, noise, torch.tensor([99]))
    x = scheduler.step(x0, 99, x, generator=torch.Generator().manual_seed(1)).prev_sample
    a, s = scheduler.marginal_scales(x0, torch.tensor([40]))
    z = (x - a * x0) / s
    assert z.mean(0).abs().max() < 4 / len(z) ** 0.5
    assert (z.var(0) - 1).abs().max() < 4 * (2 / len(z)) ** 0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_of_every_solver_have_the_data_moments(name):
    problem = ANISOTROPIC
    scheduler = scheduler_for(problem, 200, solver=name, prior_type="marginal")
    scheduler.set_timesteps(200)
    n = 40_000
    x = scheduler.sample_prior((n, 3), generator=torch.Generator().manual_seed(0)).double()
    x = run(scheduler, problem, x, generator=torch.Generator().manual_seed(1))
    # Monte Carlo error plus a first-order method's bias at 200 steps
    assert ((x.mean(0) - problem.mean) / problem.variance.sqrt()).abs().max() < 4 / n**0.5 + 0.03
    assert (x.var(0) / problem.variance - 1).abs().max() < 4 * (2 / n) ** 0.5 + 0.04
