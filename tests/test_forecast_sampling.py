"""Paths against closed forms."""

import numpy as np
import pytest
import torch

from diffusers_vsdm import DataNormalizer

from .forecasting import AHEAD, SIGMA, closed_form, exact, generator, series, small


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


@pytest.mark.parametrize(
    "given, steps",
    [
        ({"scaling": "none"}, 10),
        ({"scaling": "mean"}, 10),
        ({"scaling": "mean", "solver": "ddim"}, 199),
        ({"scaling": "mean", "prediction": "epsilon", "solver": "heun"}, 60),
        ({"scaling": "standard", "solver": "ddpm"}, 200),
        ({"scaling": "standard", "solver": "dpmsolver++"}, 60),
        ({"scaling": "mean", "differencing": 1}, 10),
        ({"scaling": "none", "differencing": 1, "phi": [0.0, 0.0]}, 10),  # a random walk
        ({"scaling": "mean", "lam": (0.7, 1.9)}, 10),
        ({"scaling": "standard", "differencing": 1, "lam": (0.7, 1.9), "solver": "heun"}, 100),
        ({"scaling": "mean", "lam": (0.7, 1.9), "prior": "marginal"}, 10),
        # short, and no dependence on the past: the marginal is the law of the data
        ({"scaling": "mean", "lam": (0.7, 1.9), "prior": "marginal", "beta_max": 2.0, "phi": [0.0, 0.0]}, 10),
        ({"scaling": "mean", "normalized": True, "lam": (0.7, 1.9)}, 10),
    ],
)
def test_paths_have_the_law_of_a_perfect_network(given, steps):
    # of first order, or of few steps, solvers make errors of their own: some percent of a variance
    given, n = dict(given), 1500 if "solver" in given else 6000
    if given.pop("normalized", False):
        given["process"] = DataNormalizer((2,))
        given["process"].mean.copy_(torch.tensor([0.5, -1.0]))
        given["process"].std.copy_(torch.tensor([0.6, 3.0]))
    pipe = exact(**given)
    history = series(20, level=0) / 3
    samples = pipe(history, n, num_inference_steps=steps, generator=generator()).samples
    assert samples.shape == (n, AHEAD, 2) and samples.dtype == np.float64
    mean, covariance = closed_form(pipe, history)
    variance = np.diagonal(covariance, axis1=1, axis2=2).T
    assert (np.abs(samples.mean(0) - mean) < 4 * np.sqrt(variance / n)).all()
    for i in range(2):
        found, wanted, v = np.cov(samples[..., i].T), covariance[i], variance[:, i]
        assert (np.abs(found - wanted) < 4 * np.sqrt((np.outer(v, v) + wanted**2) / n)).all()
    if given.get("phi") == [0.0, 0.0] and given.get("differencing"):
        np.testing.assert_allclose(variance, np.outer(np.arange(1, 5), np.square(SIGMA)), rtol=1e-6)


def test_the_law_of_a_perfect_network_needs_the_marginal_prior_in_a_short_process():
    """The check of the case above can fail: from the other prior the paths are wider by far."""
    given = {"scaling": "none", "lam": (0.7, 1.9), "beta_max": 2.0, "phi": [0.0, 0.0]}
    spread = [
        exact(prior=prior, **given)(series(20), 2000, num_inference_steps=10, generator=generator()).samples.std(
            axis=(0, 1)
        )
        / SIGMA
        for prior in ("marginal", "conditional")
    ]
    assert np.abs(spread[0] - 1).max() < 0.05 and np.abs(spread[1] - 1).max() > 0.1


@pytest.mark.parametrize("beta_max, lam", [(10.0, (1.0, 1.0)), (10.0, (0.4, 0.7)), (3.0, (1.0, 1.0))])
def test_a_short_process_draws_forecasts_to_the_marginal_prior(beta_max, lam):
    """By as much as docs/forecasting.md says: the prior does not know the past, and x_T still does."""
    pipe = exact(scaling="none", prior="marginal", beta_max=beta_max, lam=lam)
    history, n = series(20, level=0), 4000
    output = pipe(history, n, prediction_length=1, num_inference_steps=20, generator=generator())
    samples = output.samples[:, 0]
    wanted = closed_form(pipe, history)[0][0]
    sigma, drift = np.asarray(SIGMA), pipe.scheduler.drift
    a = np.exp(-0.5 * np.asarray(lam) * float(pipe.scheduler.integrated_beta[-1]))
    s2, m, v = (1 - a**2) / lam, drift.data_mean.numpy(), drift.data_variance.numpy()
    remaining = np.sqrt(a**2 * sigma**2 + s2)
    mean = wanted + a * sigma / remaining * (m - wanted)
    std = sigma * np.sqrt(a**2 * v + s2) / remaining
    assert (np.abs(samples.mean(0) - mean) < 4 * std / np.sqrt(n)).all()
    np.testing.assert_allclose(samples.std(0), std, rtol=0.05)
    assert (np.abs(mean - wanted) > 10 * std / np.sqrt(n)).any()  # or the check above shows nothing


@pytest.mark.parametrize("batch_size", [7, 64, 4096])
def test_a_history_is_forecast_the_same_whoever_is_with_it(batch_size):
    """With no noise in the data there is one path, whatever is drawn."""
    pipe = exact(sigma=[0.0, 0.0], scaling="mean", differencing=1)
    histories = [series(10 + i, seed=i) for i in range(3)]
    together = pipe(histories, 12, num_inference_steps=20, batch_size=batch_size).samples
    assert together.shape == (3, 12, AHEAD, 2)
    for history, samples in zip(histories, together, strict=True):
        expected, _ = closed_form(pipe, history)
        np.testing.assert_allclose(samples, np.broadcast_to(expected, samples.shape), rtol=1e-3)
        alone = pipe(history, 3, num_inference_steps=20).samples
        np.testing.assert_allclose(samples[:3], alone, rtol=1e-4)


def test_only_the_history_that_is_needed_is_read():
    pipe = small()
    history = series(30)
    needed = pipe.model.history_length
    other = history.copy()
    other[:-needed] = 1000.0
    expected = pipe(history, 3, generator=generator(), num_inference_steps=5).samples
    assert np.array_equal(pipe(other, 3, generator=generator(), num_inference_steps=5).samples, expected)
    shifted = [pipe(history[-needed - i :], 3, generator=generator(), num_inference_steps=5) for i in (0, 1)]
    assert not np.array_equal(shifted[0].samples, expected) or pipe.model.config["season_length"] == 1
    other[-needed] += 1
    assert not np.array_equal(pipe(other, 3, generator=generator(), num_inference_steps=5).samples, expected)
