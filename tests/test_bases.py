import numpy as np
import pytest
import scipy.fft
import torch

from diffusers_vsdm import AdaptiveDiagonalDrift, StochasticApproximation, VSDMScheduler, process
from diffusers_vsdm.bases import cosine_matrix
from diffusers_vsdm.solvers import SOLVERS


EVENT = (3, 4, 6)
DIMENSION = 3 * 4 * 6


def rotation():
    return torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q


def dct_scheduler(**settings):
    """A scheduler with a different lambda for every frequency and moments that fall with frequency."""
    scheduler = VSDMScheduler.from_power_law(clip_sample=False, **settings)
    drift = AdaptiveDiagonalDrift(EVENT, basis="dct")
    drift.rotation.copy_(rotation())
    drift.set_lambda(0.5 + torch.rand(EVENT, dtype=torch.float64))
    drift.data_mean.copy_(torch.randn(EVENT))
    drift.data_variance.copy_(5 / (1 + torch.arange(DIMENSION, dtype=torch.float64)).reshape(EVENT))
    scheduler.set_drift(drift)
    _ = scheduler.init_noise_sigma
    return scheduler, drift


def matrix(drift):
    """The basis as a dense orthogonal matrix U, `x = U y`."""
    identity = torch.eye(DIMENSION, dtype=torch.float64).reshape(DIMENSION, *EVENT)
    return drift.basis().from_basis(identity).reshape(DIMENSION, DIMENSION).T


def test_transform_is_scipys_orthonormal_dct():
    x = torch.randn(5, *EVENT, dtype=torch.float64)
    drift = AdaptiveDiagonalDrift(EVENT, basis="dct")
    expected = scipy.fft.dctn(x.numpy(), type=2, norm="ortho", axes=(-2, -1))
    np.testing.assert_allclose(drift.basis().to_basis(x), expected, atol=1e-12)
    np.testing.assert_allclose(cosine_matrix(1), [[1.0]])


def test_basis_is_orthonormal_with_its_rotation():
    _, drift = dct_scheduler()
    u = matrix(drift)
    torch.testing.assert_close(u.T @ u, torch.eye(DIMENSION, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(2, 7, *EVENT)  # leading dimensions, as of a trajectory
    basis = drift.basis(dtype=torch.float32)
    torch.testing.assert_close(basis.from_basis(basis.to_basis(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_for_networks(dtype):
    """A pipeline under autocast keeps the precision of its transforms."""
    scheduler, _ = dct_scheduler(solver="euler")
    x, k = torch.randn(2, *EVENT), torch.tensor([50])
    exact = scheduler.add_noise(x, x, k), scheduler.step(x, 99, x).prev_sample
    with torch.autocast("cpu", dtype):
        cast = scheduler.add_noise(x, x, k), scheduler.step(x, 99, x).prev_sample
    assert torch.equal(exact[0], cast[0]) and torch.equal(exact[1], cast[1])
    noise = torch.randn(4, *EVENT)
    with torch.autocast("cpu", dtype):
        drawn = scheduler.prior(dtype=torch.float32).sample(noise)
    assert torch.equal(drawn, scheduler.prior(dtype=torch.float32).sample(noise))


def test_channels_turn_to_where_all_batches_are_uncorrelated():
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.2, 0.1]]).double()
    contents = torch.randn(500, *EVENT).double() + torch.randn(EVENT).double()  # a mean that varies over the image
    data = torch.einsum("dc,nchw->ndhw", mixing, contents) + torch.tensor([3.0, -1.0, 2.0])[:, None, None]
    data[:7, 1:] *= -1  # the first batch has axes of its own
    drift = AdaptiveDiagonalDrift(EVENT, basis="dct")
    drift.fit_moments(data.split(7))
    turned = (drift.rotation @ data.flatten(2)).transpose(0, 1).flatten(1).cov()
    assert (turned - turned.diag().diag()).abs().max() < 1e-10
    assert (turned.diag().diff() < 0).all()
    y = drift.basis().to_basis(data)
    torch.testing.assert_close(drift.data_mean, y.mean(0))
    torch.testing.assert_close(drift.data_variance, y.var(0))


def test_moments_are_fitted_in_the_basis():
    _, drift = dct_scheduler()
    basis = drift.basis()
    y = drift.data_mean + drift.data_variance.sqrt() * torch.randn(20_000, *EVENT, dtype=torch.float64)
    fresh = AdaptiveDiagonalDrift(EVENT, basis="dct")
    data = basis.from_basis(y)
    fresh.fit_moments(data)
    again = fresh.basis().to_basis(data)
    torch.testing.assert_close(again.mean(0), fresh.data_mean)
    torch.testing.assert_close(again.var(0), fresh.data_variance)
    # orthonormal: the total variance is that of the pixels
    torch.testing.assert_close(fresh.data_variance.sum(), data.var(0).sum())
    fresh.set_lambda(0.7)
    fresh.fit_moments(data)  # one number for all has no basis
    fresh.lam[0, 0, 0] = 0.8
    with pytest.raises(ValueError, match="before lambda"):
        fresh.fit_moments(data)


@pytest.mark.parametrize("basis, event", [("identity", (3,)), ("dense", (3,)), ("dct", EVENT)])
def test_moments_that_cannot_be_fitted_leave_the_drift_as_it_was(basis, event):
    drift = AdaptiveDiagonalDrift(event, basis=basis)
    good = torch.randn(50, *event) + torch.randn(50, *[1] * len(event))
    drift.fit_moments(good)
    before = drift.digest()
    with pytest.raises(ValueError, match="NaN"):
        drift.fit_moments([3 * good, good * torch.nan])
    assert drift.digest() == before


def test_forward_process_is_that_of_the_dense_matrix():
    """Eq. 13 and 14 with D = U diag(lambda) U^T and matrix exponentials."""
    scheduler, drift = dct_scheduler()
    u, k = matrix(drift), 57
    g = scheduler.integrated_beta[k]
    dense = u @ drift.lam.flatten().diag() @ u.T
    x0, noise = torch.randn(4, *EVENT).double(), torch.randn(4, *EVENT).double()
    mean = torch.matrix_exp(-0.5 * dense * g) @ x0.flatten(1).T
    covariance = torch.linalg.solve(dense, torch.eye(DIMENSION).double() - torch.matrix_exp(-dense * g))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ values.sqrt().diag() @ vectors.T  # the symmetric root is what U diag(s) U^T is
    expected = (mean + root @ noise.flatten(1).T).T.reshape(x0.shape)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, torch.tensor([k])), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score", "edm"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_with_the_exact_score_gives_the_data(solver, prediction_type):
    """A Gaussian that is diagonal in the basis and not in pixels; the network answers in pixels."""
    scheduler, drift = dct_scheduler(solver=solver, prior_type="marginal", prediction_type=prediction_type)
    basis = drift.basis()
    n = 1500 if prediction_type == "epsilon" else 20
    scheduler.set_timesteps(50)
    x = scheduler.sample_prior((n, *EVENT), generator=torch.Generator().manual_seed(0)).double()
    outputs = {"epsilon": lambda e, x0, a, s: e, "sample": lambda e, x0, a, s: x0}
    outputs |= {"v_prediction": lambda e, x0, a, s: a * e - s * x0, "score": lambda e, x0, a, s: -e / s}
    p = drift.data_mean**2 + drift.data_variance
    outputs["edm"] = lambda e, x0, a, s: (s * x0 / p.sqrt() - a * p.sqrt() * e) / (a**2 * p + s**2).sqrt()
    generator = torch.Generator().manual_seed(1)
    for k in scheduler.timesteps:
        g = scheduler.integrated_beta_at(k)
        mean, variance = process.marginal_moments(drift.lam, g, drift.data_mean, drift.data_variance)
        a, s = process.mean_scale(drift.lam, g), process.std(drift.lam, g)
        y = basis.to_basis(x)
        eps = s * (y - mean) / variance
        output = basis.from_basis(outputs[prediction_type](eps, (y - s * eps) / a, a, s))
        torch.testing.assert_close(
            scheduler.get_score(output, k, x), basis.from_basis(-(y - mean) / variance), rtol=1e-4, atol=1e-4
        )
        x = scheduler.step(output, k, x, generator=generator).prev_sample
    y = basis.to_basis(x)
    if n > 100:
        assert ((y.mean(0) - drift.data_mean) / drift.data_variance.sqrt()).abs().max() < 4.5 / n**0.5 + 0.05
        # the worst of 72 sample variances, and a first-order method's bias
        assert (y.var(0) / drift.data_variance - 1).abs().max() < 4.5 * (2 / n) ** 0.5 + 0.1
    else:
        assert x.isfinite().all() and x.abs().max() < 30


def test_trig_knows_the_basis_of_a_mean_alone():
    """Neutral, the same variance everywhere, and a mean that is one frequency: the flow moves along its image."""
    scheduler, drift = dct_scheduler(solver="trig")
    drift.set_lambda(1.0)
    drift.data_mean.zero_()[0, 1, 1] = 3.0
    drift.data_variance.fill_(1.0)
    image, basis = drift.basis().from_basis(drift.data_mean), drift.basis()
    scheduler.set_timesteps(4)
    x = start = torch.randn(2, *EVENT, dtype=torch.float64)
    for k in scheduler.timesteps:
        g = scheduler.integrated_beta_at(k)
        a, s = (f(torch.ones(()).double(), g) for f in (process.mean_scale, process.std))
        x = scheduler.step(s * (x - a * image), k, x).prev_sample  # V = 1
    a = process.mean_scale(torch.ones(()).double(), scheduler.integrated_beta_at(scheduler.timesteps[0]))
    torch.testing.assert_close(basis.to_basis(x), basis.to_basis(start + (1 - a) * image), rtol=1e-9, atol=1e-9)


def test_marginal_prior_is_the_law_of_the_noised_data():
    scheduler, drift = dct_scheduler(prior_type="marginal")
    scheduler.set_timesteps(10)
    k, n, basis = scheduler.timesteps[0], 20_000, drift.basis(dtype=torch.float32)
    prior = scheduler.sample_prior((n, *EVENT))
    y = drift.data_mean + drift.data_variance.sqrt() * torch.randn(n, *EVENT)
    noised = scheduler.add_noise(basis.from_basis(y.float()), torch.randn(n, *EVENT), k)
    a, b = (x.flatten(1).double() for x in (prior, noised))
    assert ((a.mean(0) - b.mean(0)) / (a.var(0) * 2 / n).sqrt()).abs().max() < 4.5
    difference = a.T.cov() - b.T.cov()  # in pixels, where neither is diagonal
    scale = torch.outer(a.var(0), a.var(0)).sqrt() * (2 * 2 / n) ** 0.5
    assert (difference / scale).abs().max() < 5.5


def test_clipping_happens_in_pixels():
    scheduler, _ = dct_scheduler(solver="ddim")
    clipping = VSDMScheduler.from_config(scheduler.config, clip_sample=True)
    x = 3 * torch.randn(2, *EVENT)
    output = clipping.step(torch.randn(2, *EVENT), 60, x)
    assert output.pred_original_sample.abs().max() == 1


def test_stochastic_approximation_moves_in_the_basis():
    """In the basis of a diagonal Gaussian, the dct drift moves as the identity drift does on its coordinates."""
    scheduler, dct = dct_scheduler()
    lam = dct.lam.clone()
    identity = AdaptiveDiagonalDrift(EVENT)
    identity.set_lambda(lam)

    def score_of(drift, basis):
        def score(x, k):
            y = basis.to_basis(x.double())
            mean, variance = process.marginal_moments(
                lam, scheduler.integrated_beta[k], dct.data_mean, dct.data_variance
            )
            return basis.from_basis(-(y - mean) / variance).float()

        return score

    moved = []
    for drift in (dct, identity):
        approximation = StochasticApproximation(drift, scheduler.integrated_beta, num_trajectories=8, num_steps=30)
        approximation.update(score_of(drift, drift.basis()))
        moved.append(drift.lam)
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)
    assert not torch.equal(moved[0], lam)


def test_drift_travels_with_its_basis(tmp_path):
    scheduler, drift = dct_scheduler()
    scheduler.save_pretrained(tmp_path)
    loaded = VSDMScheduler.from_pretrained(tmp_path)
    assert loaded.drift.config["basis"] == "dct" and torch.equal(loaded.drift.rotation, drift.rotation)
    x, noise, k = torch.randn(2, *EVENT), torch.randn(2, *EVENT), torch.tensor([5, 90])
    assert torch.equal(loaded.add_noise(x, noise, k), scheduler.add_noise(x, noise, k))


def test_dct_of_vectors_is_refused():
    with pytest.raises(ValueError, match="for images"):
        AdaptiveDiagonalDrift((5,), basis="dct")


def test_learned_variance_is_refused_in_another_basis():
    scheduler, _ = dct_scheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="variance_type"):
        scheduler.step(torch.randn(1, 6, 4, 6), 50, torch.randn(1, *EVENT))
