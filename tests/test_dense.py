"""Drifts whose axes are learned: any symmetric positive definite D."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm import AdaptiveDiagonalDrift, StochasticApproximation, VSDMScheduler, process
from diffusers_vsdm.schedulers import scheduling_vsdm
from diffusers_vsdm.solvers import SOLVERS


N = 100
G = process.power_law_integrated_beta(torch.arange(1, N + 1, dtype=torch.float64) / N, 0.1, 10.0, 1.7)


def rotation(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def dense(matrix):
    drift = AdaptiveDiagonalDrift(tuple(matrix.shape[:1]), basis="dense")
    drift.set_lambda(matrix)
    return drift


def random_matrix(seed, d=3):
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(d).double()


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_a_matrix_comes_back(seed, d):
    matrix = random_matrix(seed, d)
    drift = dense(matrix)
    torch.testing.assert_close(drift.matrix, matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(drift.average(), matrix, rtol=1e-10, atol=1e-10)
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(drift.rotation @ drift.rotation.T, eye, rtol=0, atol=1e-12)
    again = AdaptiveDiagonalDrift((d,), basis="dense")
    again.load_state_dict(drift.state_dict())
    assert again.digest() == drift.digest()


def test_a_step_is_a_congruence():
    start, direction = random_matrix(0), random_matrix(1) - random_matrix(2)
    drift = dense(start)
    axes = drift.rotation.clone()
    drift.step(axes @ direction @ axes.T, 0.3)
    values, vectors = torch.linalg.eigh(start)
    root = (vectors * values.sqrt()) @ vectors.T
    # the square root along the axes is diagonal, and in the samples' coordinates the symmetric one
    expected = root @ torch.linalg.matrix_exp(0.3 * direction) @ root
    torch.testing.assert_close(drift.matrix, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"must be \(3, 3\)"):
        drift.step(torch.zeros(3), 0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_turned_process_is_the_process_turned(solver, monkeypatch):
    """Every solver: turned starts, with turned outputs of a network, give turned samples."""
    monkeypatch.setattr(scheduling_vsdm, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    turn, lam, variance = rotation(30), torch.tensor([0.5, 2.0]).double(), torch.tensor([0.3, 6.0]).double()
    straight = AdaptiveDiagonalDrift((2,))
    straight.set_lambda(lam)
    straight.data_variance.copy_(variance)
    turned = dense(turn @ torch.diag(lam) @ turn.T)
    turned.data_variance.copy_(variance[(turned.rotation @ turn).abs().argmax(1)])

    def run(drift, x, turn):
        scheduler = VSDMScheduler.from_power_law(beta_max=8.0, solver=solver)
        scheduler.set_drift(drift)
        scheduler.set_timesteps(10)
        for k in scheduler.timesteps:
            y = x @ turn  # back in straight coordinates
            x = scheduler.step((0.5 * y + torch.sin(y)) @ turn.T, k, x).prev_sample
        return x

    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    one, other = run(straight, x, torch.eye(2).double()), run(turned, x @ turn.T, turn)
    torch.testing.assert_close(one @ turn.T, other, rtol=1e-6, atol=1e-6)


def test_moments_of_turned_data():
    turn = rotation(30)
    data = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1.0, 8.0])
    data = (data + 3) @ turn.T
    drift = AdaptiveDiagonalDrift((2,), basis="dense")
    drift.fit_moments(iter(data.split(1300)))
    torch.testing.assert_close(drift.rotation.T @ drift.data_covariance @ drift.rotation, data.T.cov())
    torch.testing.assert_close(drift.rotation.T @ drift.data_mean, data.mean(0))
    assert drift.data_covariance[0, 1].abs() < 1e-9
    drift.set_lambda(random_matrix(0, 2))
    torch.testing.assert_close(drift.rotation.T @ drift.data_covariance @ drift.rotation, data.T.cov())
    torch.testing.assert_close(drift.data_covariance.diagonal(), drift.data_variance)
    with pytest.raises(ValueError, match="before lambda is learned"):
        drift.fit_moments(data)


def test_the_marginal_prior_keeps_all_of_the_covariance():
    """Also where the data's axes are not the drift's."""
    matrix = random_matrix(4, 2) / 4
    data = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double() @ random_matrix(5, 2)
    drift = AdaptiveDiagonalDrift((2,), basis="dense")
    drift.fit_moments(data)
    drift.set_lambda(matrix)
    scheduler = VSDMScheduler.from_power_law(beta_max=3.0, prior_type="marginal")
    scheduler.set_drift(drift)
    x = scheduler.sample_prior((100_000, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = float(scheduler.integrated_beta[-1])
    a = torch.linalg.matrix_exp(-0.5 * g * matrix)
    s2 = torch.linalg.solve(matrix, torch.eye(2).double() - a @ a)
    expected = a @ data.T.cov() @ a + s2
    torch.testing.assert_close(x.T.cov(), expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(x.mean(0), a @ data.mean(0), rtol=0.05, atol=0.02)


def learned(basis, turn, start, stages=40):
    """The average after learning with the exact score of N(0, diag(1/2, 20)) that is turned."""
    variance = torch.tensor([0.5, 20.0]).double()
    covariance = turn @ torch.diag(variance) @ turn.T
    drift = AdaptiveDiagonalDrift((2,), basis=basis)
    if start is not None:
        drift.rotation.copy_(start)

    def score(x, k):
        matrix = drift.matrix if basis == "dense" else torch.diag(drift.lam)
        a = torch.linalg.matrix_exp(-0.5 * G[k] * matrix)
        s2 = torch.linalg.solve(matrix, torch.eye(2).double() - a @ a)
        return -torch.linalg.solve(a @ covariance @ a + s2, x.double().T).T.float()

    approximation = StochasticApproximation(drift, G, num_trajectories=1000)
    for _ in range(stages):
        approximation.update(score)
    return drift.average()


@pytest.mark.parametrize("start", [0, 30, 75])
def test_the_axes_are_learned(start):
    """From any start, D is that of the straight problem, turned."""
    straight = torch.diag(learned("identity", rotation(0), None))
    turned = learned("dense", rotation(30), rotation(start).T)
    back = rotation(30).T @ turned @ rotation(30)
    torch.testing.assert_close(back.diagonal(), straight.diagonal(), rtol=0.06, atol=0)
    assert back[0, 1].abs() < 0.05
    plain = learned("identity", rotation(30), None)
    assert plain.max() / plain.min() < 0.6 * straight.diagonal().max() / straight.diagonal().min()


def test_the_inner_products_gradient_is_the_formulas_symmetric_part():
    drift = dense(random_matrix(0))
    approximation = StochasticApproximation(drift, G, zeta=0.75, zeta_placement="inner_product", clip=100.0)
    score_x, x_x = torch.randn(3, 3).double(), random_matrix(2)
    a = (torch.eye(3).double() - torch.diag(drift.lam)) / 2
    expected = torch.eye(3).double() + 0.75 * score_x + 0.25 * a @ x_x
    expected = (expected + expected.T) / 2
    torch.testing.assert_close(approximation._gradient(score_x, x_x), expected)
    # clipped, it keeps its axes
    values, vectors = torch.linalg.eigh(expected)
    assert values.min() < -0.5 and values.max() > 0.5
    approximation.clip = 0.5
    clipped = vectors @ torch.diag(values.clamp(-0.5, 0.5)) @ vectors.T
    torch.testing.assert_close(approximation._gradient(score_x, x_x), clipped)


def test_the_clip_is_of_eigenvalues():
    """Which neither shortens a gradient in all of its axes nor turns it."""
    approximation = StochasticApproximation(dense(torch.eye(2).double()), G, zeta=0.75, clip=1.0)
    turn = rotation(30)
    for value, clipped in ((3.0, 1.0), (-3.0, -1.0), (0.9, 0.9)):
        gradient, expected = (turn @ torch.diag(torch.tensor([v, -0.2]).double()) @ turn.T for v in (value, clipped))
        found = approximation._gradient(gradient - 0.75 * torch.eye(2), torch.eye(2).double())
        torch.testing.assert_close(found, expected)


def test_a_gradient_that_keeps_its_direction_while_the_axes_turn_changes_no_sign():
    drift = AdaptiveDiagonalDrift((2,), basis="dense")
    approximation = StochasticApproximation(drift, G, step_count="sign_changes")
    pull, counts = torch.diag(torch.tensor([1.0, -1.0]).double()), []  # along the axes of the samples
    for degrees, gradient in ((0, pull), (60, pull), (60, -pull)):
        drift.rotation.copy_(rotation(degrees))
        counts.append(int(approximation._count(drift.rotation @ gradient @ drift.rotation.T)))
        torch.testing.assert_close(approximation.last_gradient, gradient)
    assert counts == [1, 1, 2]


def test_the_minimizer_solves_its_equation():
    """(A M + M A) / 2 = -I - sym S + (A_k M + M A_k) / 2."""
    drift = dense(random_matrix(0))
    approximation = StochasticApproximation(drift, G, zeta=1.0, update="ipf")
    score_x, x_x = -random_matrix(1) / 3, random_matrix(2)
    a_k = (torch.eye(3).double() - torch.diag(drift.lam)) / 2
    a = (torch.eye(3).double() - approximation._minimizer(score_x, x_x)) / 2
    right = -torch.eye(3).double() - score_x + (a_k @ x_x + x_x @ a_k) / 2
    torch.testing.assert_close((a @ x_x + x_x @ a) / 2, right)


def test_saved_and_loaded(tmp_path):
    scheduler = VSDMScheduler.from_power_law()
    scheduler.set_drift(dense(random_matrix(0)))
    scheduler.save_pretrained(tmp_path)
    loaded = VSDMScheduler.from_pretrained(tmp_path).drift
    assert loaded.digest() == scheduler.drift.digest()
    torch.testing.assert_close(loaded.matrix, random_matrix(0))


@pytest.mark.parametrize("shape, lambda_shape", [((3, 8, 8), None), ((4,), (1,))])
def test_only_vectors_have_dense_drifts(shape, lambda_shape):
    with pytest.raises(ValueError, match="'dense' is for vectors"):
        AdaptiveDiagonalDrift(shape, lambda_shape, basis="dense")
    with pytest.raises(ValueError, match="finite and not negative"):
        dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="symmetric"):
        dense(torch.tensor([[1.0, 0.2], [0.0, 1.0]]))
