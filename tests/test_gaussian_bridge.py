"""The closed-form Gaussian bridge against what defines it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm import process
from diffusers_vsdm.bridges import GaussianSchrodingerBridge


def random_covariance(generator, d, scale=1.0):
    factor = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return scale * (factor @ factor.T / d + 0.1 * torch.eye(d))


def random_bridge(seed, d=3, total=1.0, lam=1.0):
    generator = torch.Generator().manual_seed(seed)
    mean, prior_mean = 2 * torch.randn(2, d, generator=generator, dtype=torch.float64)
    covariance, prior_covariance = (random_covariance(generator, d, scale) for scale in (3.0, 1.0))
    return GaussianSchrodingerBridge(mean, covariance, total, prior_mean, prior_covariance, lam)


bridges = st.builds(
    random_bridge,
    st.integers(0, 10_000),
    d=st.integers(1, 5),
    total=st.floats(0.3, 6.0),
    lam=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)


@given(bridges)
@settings(deadline=None, max_examples=40)
def test_both_ends_are_met(bridge):
    for g, mean, covariance in (
        (0.0, bridge.mean, bridge.covariance),
        (float(bridge.total), bridge.prior_mean, bridge.prior_covariance),
    ):
        at = bridge.marginal(g)
        torch.testing.assert_close(at[0], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(at[1], covariance, rtol=1e-9, atol=1e-9)


@given(bridges)
@settings(deadline=None, max_examples=40)
def test_the_coupling_is_the_reference_reweighted_at_its_ends(bridge):
    """The optimality of entropic transport: log pi(x, y) - log reference(y | x) is a sum f(x) + h(y)."""
    joint = torch.cat(
        [
            torch.cat([bridge.covariance, bridge.coupling], 1),
            torch.cat([bridge.coupling.T, bridge.prior_covariance], 1),
        ]
    )
    d = len(bridge.mean)
    mixed = torch.linalg.inv(joint)[:d, d:]
    a, s2 = process.mean_scale(bridge.lam, bridge.total), process.variance(bridge.lam, bridge.total)
    torch.testing.assert_close(mixed, -a / s2 * torch.eye(d, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@given(bridges, st.sampled_from([False, True]))
@settings(deadline=None, max_examples=30)
def test_the_drift_carries_one_end_to_the_other(bridge, backward):
    """Mean and covariance, integrated along the affine drift by Runge-Kutta, against the marginals."""
    steps = 400
    times = torch.linspace(0, float(bridge.total), steps + 1, dtype=torch.float64)
    times = times.flip(0) if backward else times
    eye = torch.eye(len(bridge.mean), dtype=torch.float64)

    def rates(g, mean, covariance):
        matrix, vector = bridge.forward_score(g)
        if backward:  # grad log psi-hat is the score without grad log psi
            at = bridge.marginal(g)
            inverse = torch.linalg.inv(at[1])
            matrix, vector = inverse + matrix, vector - inverse @ at[0]
        matrix = matrix - 0.5 * bridge.lam * eye
        noise = -eye if backward else eye
        return matrix @ mean + vector, matrix @ covariance + covariance @ matrix.T + noise

    mean, covariance = bridge.marginal(times[0])
    for g, g_next in zip(times[:-1], times[1:], strict=True):
        h = g_next - g
        k1 = rates(g, mean, covariance)
        k2 = rates(g + h / 2, mean + h / 2 * k1[0], covariance + h / 2 * k1[1])
        k3 = rates(g + h / 2, mean + h / 2 * k2[0], covariance + h / 2 * k2[1])
        k4 = rates(g_next, mean + h * k3[0], covariance + h * k3[1])
        mean = mean + h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        covariance = covariance + h / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
    expected = bridge.marginal(times[-1])
    torch.testing.assert_close(mean, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance, expected[1], rtol=1e-3, atol=1e-3)


def test_the_flow_is_the_mean_of_both_drifts():
    bridge = random_bridge(3)
    x, g = torch.randn(7, 3, dtype=torch.float64), 0.4
    matrix, vector = bridge.forward_score(g)
    forward = -0.5 * x + x @ matrix + vector
    backward = -0.5 * x - bridge.backward_score(x, g)
    torch.testing.assert_close(bridge.velocity(x, g), (forward + backward) / 2)


def test_one_axis_is_as_in_the_literature():
    """Wide data against N(0, 1): A_t = -a^2 b / (1 + b s^2), b from the condition at the end."""
    variance, total = 9.0, 1.0
    bridge = GaussianSchrodingerBridge(torch.zeros(1), torch.tensor([[variance]]), total)
    a, s2 = math.exp(-total / 2), 1 - math.exp(-total)
    # the end's variance under psi_T = exp(-b y^2 / 2): (a^2 v / (1 + b s^2) + s^2) / (1 + b s^2) = 1
    u = (s2 + math.sqrt(s2**2 + 4 * a**2 * variance)) / 2  # 1 + b s^2
    b = (u - 1) / s2
    matrix, vector = bridge.forward_score(0.0)
    assert float(matrix) == pytest.approx(-(a**2) * b / (1 + b * s2), rel=1e-12)
    assert float(vector) == 0


def test_a_prior_that_the_reference_reaches_asks_for_nothing():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    mean, total = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.7
    a, s2 = math.exp(-total / 2), 1 - math.exp(-total)
    bridge = GaussianSchrodingerBridge(
        mean, covariance, total, a * mean, a**2 * covariance + s2 * torch.eye(2).double()
    )
    matrix, vector = bridge.forward_score(torch.linspace(0, total, 5, dtype=torch.float64))
    assert matrix.abs().max() < 1e-12 and vector.abs().max() < 1e-12


def test_the_variational_gap_is_a_monte_carlo_mean():
    """Theorem 4 along simulated paths of the bridge, within the Monte Carlo error and the step's bias."""
    bridge = random_bridge(5, d=2)
    n, steps = 20_000, 200
    g = torch.linspace(0, float(bridge.total), steps + 1, dtype=torch.float64)
    drift = torch.diag_embed(torch.stack([-0.2 - 0.1 * g, 0.1 * g], dim=-1))
    generator = torch.Generator().manual_seed(0)
    x = (
        bridge.mean
        + torch.randn(n, 2, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(bridge.covariance).T
    )
    total = torch.zeros(n, dtype=torch.float64)
    for i in range(steps):
        h = g[i + 1] - g[i]
        matrix, vector = bridge.forward_score(g[i])
        psi = x @ matrix + vector
        total += 0.5 * h * (x @ drift[i] - psi).square().sum(1)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        x = x + h * (psi - 0.5 * x) + h.sqrt() * noise
    gap = bridge.variational_gap(drift, g)
    error = float(total.std() / n**0.5)
    assert abs(float(total.mean()) - gap) < 4 * error + 0.01 * gap
    centred = GaussianSchrodingerBridge(torch.zeros(2), bridge.covariance, 1.0)
    assert centred.variational_gap(centred.forward_score(g)[0], g) < 1e-12
    assert centred.variational_gap(drift, g) > 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": torch.zeros(3)}, "mean"),
        ({"covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "covariance"),
        ({"prior_covariance": torch.zeros(2, 2)}, "prior_covariance"),
        ({"total": math.inf}, "total"),
        ({"lam": -1.0}, "lam"),
        ({"prior_mean": torch.full((2,), math.nan)}, "prior_mean"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=f"`{message}`"):
        GaussianSchrodingerBridge(**{"mean": torch.zeros(2), "covariance": torch.eye(2), "total": 1.0} | change)


def test_times_outside_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        random_bridge(0).marginal(1.5)
