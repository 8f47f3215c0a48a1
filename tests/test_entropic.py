"""The entropic transport that bridges are measured by."""

import math

import torch

from benchmarks.entropic import EntropicTransport, bures_wasserstein, moments, unexplained_variance


def log_density(transport, x, y):
    """Of y given x, `(n,)`."""
    log_weights, means = transport.plan(x)
    variance = transport.epsilon * transport.scales
    normals = -0.5 * ((y[:, None] - means) ** 2 / variance + (2 * math.pi * variance).log())
    return torch.logsumexp(log_weights + normals.sum(2), 1)


def test_the_plan_is_optimal():
    """Its logarithm is <x, y> / epsilon and functions of x and of y alone: mixed differences leave nothing else."""
    transport = EntropicTransport.draw(3, 0.5)
    x, x2, y, y2 = torch.randn(4, 50, 3, dtype=torch.float64)
    mixed = log_density(transport, x, y) - log_density(transport, x2, y)
    mixed = mixed - log_density(transport, x, y2) + log_density(transport, x2, y2)
    torch.testing.assert_close(mixed, ((x - x2) * (y - y2)).sum(1) / 0.5)


def test_its_own_samples_are_near_it_and_others_are_not():
    transport, generator = EntropicTransport.draw(2, 1.0), torch.Generator().manual_seed(0)
    rows = torch.randn(50, 2, generator=generator)
    reference = transport.sample(torch.randn(50_000, 2, generator=generator), generator)
    exact = transport.sample(rows.repeat_interleave(2000, 0), generator).reshape(50, 2000, 2)
    other = reference[torch.randint(len(reference), (50, 2000), generator=generator)]  # without regard to the start
    again = transport.sample(torch.randn(20_000, 2, generator=generator), generator)
    near, far = (unexplained_variance(transport, rows, ends, again, reference) for ends in (exact, other))
    assert near["cBW2-UVP"] < 0.15 and far["cBW2-UVP"] > 2.5
    assert far["BW2-UVP"] < 0.1  # the marginal does not tell
    constant = reference.mean(0).expand(20_000, 2)
    none = unexplained_variance(transport, rows, exact, constant, reference)
    assert abs(none["BW2-UVP"] - 100) < 0.1


def test_bures_wasserstein_of_commuting_covariances():
    a, b = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.diag(torch.tensor([1.0, 9.0])).double()
    found = bures_wasserstein(torch.zeros(2).double(), a, torch.ones(2).double(), b)
    torch.testing.assert_close(found, torch.tensor(2.0 + 1.0 + 4.0).double())


def test_moments_are_those_of_samples():
    samples = torch.randn(4, 100, 3)
    mean, covariance = moments(samples)
    torch.testing.assert_close(mean, samples.double().mean(1))
    torch.testing.assert_close(covariance[2], samples[2].double().T.cov())
