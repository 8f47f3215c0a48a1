"""The bound of Eq. 20, against closed forms for Gaussian data and linear drifts."""

import math

import numpy as np
import pytest
import torch

from diffusers_vsdm import process
from diffusers_vsdm.objectives import (
    PathKL,
    divergence,
    draw_probe,
    drift_matching,
    implicit_matching,
    likelihood_bound,
    path_log_ratio,
)
from diffusers_vsdm.objectives.path_kl import draw_times

from .problems import ANISOTROPIC, DiagonalGaussian, scheduler_for


class Linear:
    """Gaussian data, u = -D x / 2 with D diagonal, b = (B - D / 2) x + c, prior N(m1, diag(v1)): all is known."""

    def __init__(self, seed, d=2):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.d, self.total = d, float(0.5 + 3 * torch.rand((), generator=generator))
        self.data = DiagonalGaussian(normal(d), normal(d).exp(), (0.5 * normal(d)).exp())
        self.matrix, self.vector = torch.diag(normal(d).exp()) + 0.3 * normal(d, d), 0.3 * normal(d)
        self.prior_mean, self.prior_variance = 0.3 * normal(d), (0.3 * normal(d)).exp()
        prior = torch.distributions.Normal(self.prior_mean, self.prior_variance.sqrt())
        self.kl = PathKL(self.forward, self.backward, self.total, lambda x: prior.log_prob(x).sum(1))

    def forward(self, x, g):
        return -0.5 * self.data.lam * x

    def backward(self, x, g):
        return x @ self.matrix.T + self.vector - 0.5 * self.data.lam * x

    def draw(self, g, noise):
        mean, variance = self.data.moments(g[:, None])
        return mean + variance.sqrt() * noise

    def score(self, x, g):
        return self.data.score(x, g[:, None])

    def prior_loss(self):
        mean, variance = self.data.moments(torch.tensor(self.total, dtype=torch.float64))
        ratio = variance / self.prior_variance
        return float(0.5 * (ratio - 1 - ratio.log() + (mean - self.prior_mean) ** 2 / self.prior_variance).sum())

    def drift_matching(self):
        """|u - score - b|^2 is of (1/V - B)(x - m) - (B m + c) with x Gaussian; the integral by quadrature."""
        nodes, weights = (torch.as_tensor(x) for x in np.polynomial.legendre.leggauss(200))
        g = 0.5 * self.total * (nodes + 1)
        mean, variance = self.data.moments(g[:, None])
        wide = torch.diag_embed(1 / variance) - self.matrix
        off = mean @ self.matrix.T + self.vector
        each = (wide**2 * variance[:, None, :]).sum((1, 2)) + off.square().sum(1)
        return float((0.5 * each * weights).sum() * self.total / 2)

    def entropy(self):
        return float(0.5 * (self.data.variance.log() + 1 + math.log(2 * math.pi)).sum())


def z(estimate, truth):
    return abs(estimate.value - truth) / estimate.standard_error


@pytest.mark.parametrize("seed", range(20))
def test_the_estimates_are_the_closed_form(seed):
    problem, n = Linear(seed), 20_000
    generator = torch.Generator().manual_seed(1000 + seed)
    noise, other = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    g = problem.total * torch.rand(n, generator=generator, dtype=torch.float64)
    x = problem.draw(g, noise)
    end = problem.draw(torch.full((n,), problem.total), other)
    mean, variance = problem.data.moments(torch.tensor(problem.total, dtype=torch.float64))
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(end).sum(1)
    assert z(problem.kl.prior_loss(end, density), problem.prior_loss()) < 3.5
    assert z(problem.kl.explicit(x, g, problem.score(x, g)), problem.drift_matching()) < 3.5
    # Eq. 24: without the score, the sum is larger by the data's entropy
    cross, implicit = problem.kl.prior_cross_entropy(end), problem.kl.implicit(x, g)
    error = math.hypot(cross.standard_error, implicit.standard_error)
    truth = problem.prior_loss() + problem.drift_matching() + problem.entropy()
    assert abs(cross.value + implicit.value - truth) < 3.5 * error


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_eq_24_with_random_directions(kind):
    problem, n = Linear(3, d=5), 50_000
    generator = torch.Generator().manual_seed(0)
    g = problem.total * torch.rand(n, generator=generator, dtype=torch.float64)
    x = problem.draw(g, torch.randn(n, 5, generator=generator, dtype=torch.float64))
    exact, estimate = problem.kl.implicit(x, g), problem.kl.implicit(x, g, kind=kind, generator=generator)
    assert 0 < abs(estimate.value - exact.value) < 3.5 * estimate.standard_error


def test_times_uniform_in_the_log_snr_measure_the_same_integral_better():
    """With a constant error in epsilon, whose matching error goes as 1 / s^2, no noise is left at all."""
    problem, n = Linear(0), 4000
    lam = problem.data.lam[0]
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (1e-3, problem.total))
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g, inverse_density = draw_times(u, lam, start, end)
    assert start <= g.min() and g.max() <= end
    off = (1 / process.std(lam, g))[:, None] * torch.ones(n, 2, dtype=torch.float64)
    kl = PathKL(lambda x, g: 0 * x, lambda x, g: off, problem.total, lambda x: x.sum(1))
    found = kl.explicit(torch.zeros(n, 2, dtype=torch.float64), g, torch.zeros(()), inverse_density)
    truth = float(torch.log(torch.expm1(lam * end) / torch.expm1(lam * start)))
    assert found.value == pytest.approx(truth, rel=1e-9) and found.standard_error < 1e-9


def test_three_forms_of_score_matching_have_one_gradient():
    """Explicit, denoising and implicit (Eq. 22 to 24): at one time, in the parameters of a linear b."""
    problem, n, g = Linear(5), 400_000, torch.tensor(0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    a, s = process.mean_scale(problem.data.lam, g), process.std(problem.data.lam, g)
    x0 = problem.data.mean + problem.data.variance.sqrt() * torch.randn(n, 2, generator=generator).double()
    noise = torch.randn(n, 2, generator=generator).double()
    x = a * x0 + s * noise
    u = problem.forward(x, g)

    def gradients(loss):
        """Of each sample's loss, in B and c: (n, 6)."""
        matrix, vector = problem.matrix.expand(n, 2, 2).clone(), problem.vector.expand(n, 2).clone()
        matrix.requires_grad_(), vector.requires_grad_()
        b = (matrix @ x[..., None])[..., 0] + vector + u
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1) - 0.5 * problem.data.lam.sum()
        parts = torch.autograd.grad(loss(b, trace).sum(), (matrix, vector))
        return torch.cat([part.flatten(1) for part in parts], 1)

    explicit = gradients(lambda b, trace: drift_matching(u, problem.data.score(x, g), b))
    denoising = gradients(lambda b, trace: drift_matching(u, process.conditional_score(noise, s), b))
    implicit = gradients(lambda b, trace: implicit_matching(u, b, trace))
    for other in (denoising, implicit):
        difference = other - explicit
        assert difference.std() > 0.01
        assert (difference.mean(0).abs() / (difference.std(0) / math.sqrt(n))).max() < 4
    assert (explicit.mean(0).abs() / (explicit.std(0) / math.sqrt(n))).min() > 10  # it is not 0


def test_girsanov_is_the_limit_of_the_ratio_of_discrete_paths():
    """Eq. 19: the mean log-ratio of many small steps."""
    problem, n, m = Linear(7), 20_000, 400
    generator = torch.Generator().manual_seed(0)
    g = torch.linspace(0, problem.total, m + 1, dtype=torch.float64)
    x, lam = problem.draw(torch.zeros(n), torch.randn(n, 2, generator=generator).double()), problem.data.lam
    path = [x]
    for step in torch.diff(g):
        noise = torch.randn(n, 2, generator=generator).double()
        path.append(process.mean_scale(lam, step) * path[-1] + process.std(lam, step) * noise)
    path, g = torch.stack(path).flip(0), g.flip(0)
    reversal = torch.stack(
        [problem.forward(y, t) - problem.data.score(y, t) for y, t in zip(path[:-1], g[:-1], strict=True)]
    )
    backward = torch.stack([problem.backward(y, t) for y, t in zip(path[:-1], g[:-1], strict=True)])
    ratio = path_log_ratio(path, g, reversal, backward)
    truth, error = problem.drift_matching(), float(ratio.std() / math.sqrt(n))
    assert abs(float(ratio.mean()) - truth) < 3.5 * error  # what the steps still cost is less than the noise
    assert truth > 20 * error


def test_both_terms_vanish_where_the_forward_process_can_reach_the_prior():
    """Joint training by Eq. 24 of a VSDM's lambda and of b, on Gaussian data: both terms of Eq. 20 below 1e-3 nats."""
    total, variance = 2.0, torch.tensor([3.0, 0.2], dtype=torch.float64)
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.legendre.leggauss(40))
    g, weights = 0.5 * total * (nodes + 1), 0.5 * total * weights
    log_lam = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    shape = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
    powers = torch.stack([(g / total) ** i for i in range(8)], 1)
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)  # mean 0, covariance 1

    def terms():
        lam = log_lam * 4 + torch.tensor([1.0, 1.0])  # of either sign: a small variance has to grow
        spread = torch.exp(-lam * g[:, None]) * variance - torch.expm1(-lam * g[:, None]) / lam
        end = torch.exp(-lam * total) * variance - torch.expm1(-lam * total) / lam
        rate = torch.exp(-powers @ shape)  # b = (rate - lam / 2) x
        return lam, spread, end, rate

    def implicit():
        lam, spread, end, rate = terms()
        x = corners[:, None] * spread.sqrt()
        each = [implicit_matching(-0.5 * lam * y, (rate - 0.5 * lam) * y, (rate - 0.5 * lam).sum(1)) for y in x]
        return (torch.stack(each).mean(0) * weights).sum() + 0.5 * end.sum()

    optimizer = torch.optim.LBFGS(
        [log_lam, shape], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure():
        optimizer.zero_grad()
        loss = implicit()
        loss.backward()
        return loss

    optimizer.step(closure)
    lam, spread, end, rate = (x.detach() for x in terms())
    prior_loss = float(0.5 * (end - 1 - end.log()).sum())
    matching = float((0.5 * ((1 / spread - rate) ** 2 * spread).sum(1) * weights).sum())
    assert prior_loss < 1e-3 and matching < 1e-3
    assert abs(float(lam[0]) - 1) > 0.05  # and not where it began


def test_divergence_of_a_nonlinear_field():
    torch.manual_seed(0)
    x = torch.randn(50, 2, 3, dtype=torch.float64)

    def field(x):
        return x.sin() * x.flip(1) ** 2

    value, exact = divergence(field, x, None)
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(exact, (x.cos() * x.flip(1) ** 2).sum((1, 2)))
    x = x[:1].expand(20_000, 2, 3)
    for kind in ("gaussian", "rademacher"):
        found = divergence(field, x, draw_probe(x, kind, torch.Generator().manual_seed(0)))[1]
        assert abs(float(found.mean() - exact[0])) < 4 * float(found.std()) / math.sqrt(len(x))


def test_divergence_can_be_trained_with():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    for probe in (None, torch.ones(1, 2, dtype=torch.float64)):
        _, found = divergence(lambda y: weight * y**2, x, probe, create_graph=True)
        torch.testing.assert_close(found, torch.tensor([12.0], dtype=torch.float64))
        (gradient,) = torch.autograd.grad(found.sum(), weight)
        assert float(gradient) == pytest.approx(6)


def test_what_cannot_be_had_is_an_error():
    with pytest.raises(ValueError, match="3072.*rademacher"):
        draw_probe(torch.zeros(1, 3, 32, 32), "exact")
    with pytest.raises(ValueError, match="divergence"):
        draw_probe(torch.zeros(1, 2), "hutchinson")
    kl = PathKL(lambda x, g: x, lambda x, g: x / 0, 1.0, lambda x: x.sum(1))
    with pytest.raises(FloatingPointError, match="backward drift is not finite at 4"):
        kl.implicit(torch.ones(4, 2), torch.ones(4))


@pytest.mark.parametrize("prior_type", ["marginal", "conditional"])
def test_the_bound_of_a_perfect_network(prior_type):
    """What it is above the entropy of the data is the prior's loss, and what a Gaussian decoder does not know."""
    problem = ANISOTROPIC
    scheduler = scheduler_for(problem, prior_type=prior_type)
    g = scheduler.integrated_beta
    generator = torch.Generator().manual_seed(0)
    x = problem.mean + problem.variance.sqrt() * torch.randn(20_000, 3, generator=generator).double()

    def score(x, k):
        return problem.score(x, scheduler.integrated_beta_at(k)[:, None])

    bound = likelihood_bound(score, scheduler, x, 4, generator)
    mean, variance = problem.moments(g[-1])
    prior = scheduler.prior()
    ratio = variance / prior.std**2
    prior_loss = 0.5 * (ratio - 1 - ratio.log() + (mean - prior.mean) ** 2 / prior.std**2).sum()
    a, s2 = process.mean_scale(problem.lam, g[0]), process.variance(problem.lam, g[0])
    decoder = 0.5 * torch.log1p(s2 / (a**2 * problem.variance)).sum()  # the data know more of x_0 than x_1 / a_1
    entropy = 0.5 * (problem.variance.log() + 1 + math.log(2 * math.pi)).sum()
    error = float(bound.total.std()) / math.sqrt(len(x))
    assert abs(float(bound.total.mean() - (entropy + prior_loss + decoder))) < 3.5 * error
    assert error < 0.05
