import math

import numpy as np
import pytest
import torch

from diffusers_vsdm import AdaptiveDiagonalDrift, StochasticApproximation, process, stochastic_approximation

from .problems import DiagonalGaussian


N = 100
T = torch.arange(1, N + 1, dtype=torch.float64) / N
G = process.power_law_integrated_beta(T, 0.1, 10.0, 1.7)
MEAN = torch.tensor([0.0, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.5, 20.0], dtype=torch.float64)


def gaussian(drift):
    return DiagonalGaussian(MEAN, VARIANCE, drift.lam)


def exact_score(drift):
    return lambda x, k: gaussian(drift).score(x.double(), G[k]).float()


def exact_moments(approximation, drift):
    """Expectations of the simulated moments, by recursion of the simulated chain's own mean and variance."""
    problem = gaussian(drift)
    mean, variance = torch.zeros(2).double(), torch.ones(2).double()
    score_x, x_x, total = 0, 0, 0
    for g, g_next in zip(approximation.g, approximation.g_next, strict=True):
        m_t, v_t = problem.moments(g)
        dg = g - g_next
        second = variance + mean**2
        score_x = score_x - dg * (second - m_t * mean) / v_t
        x_x = x_x + dg * second
        total = total + dg
        # the predicted data, then the posterior given it: both linear in x
        on_x, on_x0, noise = process.posterior(drift.lam, g, g_next)
        at_zero, at_one = (problem.posterior(x * torch.ones(2).double(), g)[0] for x in (0.0, 1.0))
        slope, offset = on_x + on_x0 * (at_one - at_zero), on_x0 * at_zero
        mean, variance = slope * mean + offset, slope**2 * variance + noise
    return score_x / total, x_x / total


@pytest.mark.parametrize("lam", [[1.0, 1.0], [0.3, 3.0]])
def test_moments_are_those_of_the_simulated_chain(lam):
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor(lam))
    approximation = StochasticApproximation(drift, G, num_trajectories=1)
    expected = torch.stack(exact_moments(approximation, drift))
    # batches of one stage each, for a standard error that assumes nothing
    stages = []
    for seed in range(30):
        drift.set_lambda(torch.tensor(lam))
        output = StochasticApproximation(drift, G, num_trajectories=400, seed=seed).update(exact_score(drift))
        stages.append(torch.stack([output.score_x, output.x_x]))
    stages = torch.stack(stages)
    z = (stages.mean(0) - expected) / (stages.std(0) / math.sqrt(len(stages)))
    assert z.abs().max() < 4, z


def root_of_the_mean_field(zeta):
    """The lambda at which the exact moments balance, by bisection."""
    low, high = torch.full((2,), 0.02).double(), torch.full((2,), 20.0).double()
    root = AdaptiveDiagonalDrift((2,))
    approximation = StochasticApproximation(root, G)
    for _ in range(60):
        root.set_lambda((low * high).sqrt())
        below = exact_moments(approximation, root)[0] + zeta > 0  # lambda still rises
        low, high = torch.where(below, root.lam, low), torch.where(below, high, root.lam)
    return root.lam


@pytest.mark.parametrize("step_count", ["stages", "sign_changes"])
@pytest.mark.parametrize("zeta", [0.8, 0.9])
def test_converges_to_the_root_of_its_mean_field(zeta, step_count):
    """Robbins-Monro with the exact score."""
    drift = AdaptiveDiagonalDrift((2,))
    approximation = StochasticApproximation(drift, G, zeta=zeta, step_count=step_count, num_trajectories=1000)
    for _ in range(120):
        approximation.update(exact_score(drift))
    np.testing.assert_allclose(drift.average("polyak"), root_of_the_mean_field(zeta), rtol=0.05)
    assert drift.lam[1] > 1.2 * drift.lam[0]  # the wide axis is driven harder


def test_a_far_limit_is_reached_sooner_by_sign_changes():
    """The narrow axis responds little to its lambda, and is the one with a long way."""
    root, errors = root_of_the_mean_field(0.75), {}
    for step_count in ("stages", "sign_changes"):
        found = []
        for seed in range(4):
            drift = AdaptiveDiagonalDrift((2,))
            drift.set_lambda(4.0)
            settings = {"step_scale": 1.0, "step_offset": 0.0, "step_count": step_count, "seed": seed}
            approximation = StochasticApproximation(drift, G, num_trajectories=500, **settings)
            for _ in range(20):
                approximation.update(exact_score(drift))
            found.append(drift.average())
        errors[step_count] = torch.stack(found).mean(0) / root - 1
    assert errors["sign_changes"].abs().max() < 0.15 and errors["stages"][0] > 0.5


def test_inner_product_convention_uses_its_own_gradient():
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor([0.5, 2.0]))
    lam = drift.lam.clone()
    approximation = StochasticApproximation(
        drift, G, zeta=0.75, zeta_placement="inner_product", num_trajectories=64, clip=100.0
    )
    output = approximation.update(exact_score(drift))
    expected = 1 + 0.75 * output.score_x + 0.25 * (1 - lam) / 2 * output.x_x
    torch.testing.assert_close(output.gradient, expected)
    torch.testing.assert_close(drift.lam, lam * torch.exp(output.step_size * expected))


def test_conventions_agree_at_zeta_one():
    outputs = []
    for placement in ("divergence", "inner_product"):
        drift = AdaptiveDiagonalDrift((2,))
        approximation = StochasticApproximation(drift, G, zeta=1.0, zeta_placement=placement, num_trajectories=32)
        outputs.append(approximation.update(exact_score(drift)).lam)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("step_count", ["stages", "sign_changes"])
def test_steps_obey_a5_and_the_clip(step_count):
    drift = AdaptiveDiagonalDrift((2,))
    settings = {"step_scale": 2.0, "step_offset": 5.0, "step_power": 0.8, "clip": 0.01, "step_count": step_count}
    approximation = StochasticApproximation(drift, G, num_trajectories=4, **settings)
    signs = []
    for k in range(1, 20):
        before = drift.lam.clone()
        output = approximation.update(exact_score(drift))
        signs.append(output.gradient.sign())
        changes = sum((a != b for a, b in zip(signs, signs[1:], strict=False)), torch.zeros(2))
        expected = 2.0 / ((k if step_count == "stages" else 1 + changes) ** 0.8 + 5.0)
        torch.testing.assert_close(torch.as_tensor(output.step_size).expand(2).float(), expected + torch.zeros(2))
        assert output.gradient.abs().max() <= 0.01
        torch.testing.assert_close(drift.lam, before * torch.exp(output.step_size * output.gradient))
    assert changes.min() > 0 and changes[0] != changes[1]


@pytest.mark.parametrize("factor", [float("nan"), 1e20])
def test_moments_that_are_not_finite_skip_the_update_and_are_counted(factor):
    drift = AdaptiveDiagonalDrift((2,))
    approximation = StochasticApproximation(drift, G, num_trajectories=8)
    with pytest.warns(RuntimeWarning, match="not finite"):
        output = approximation.update(lambda x, k: x * factor)
    assert output.skipped and approximation.num_skipped == 1
    assert drift.is_neutral and int(drift.num_updates) == 0
    assert not approximation.update(exact_score(drift)).skipped
    assert approximation.num_stages == 2 and int(drift.num_updates) == 1


def test_result_depends_neither_on_batches_nor_on_processes():
    def stage(batch_size, shares):
        drift = AdaptiveDiagonalDrift((2,))
        sums = []
        for index in range(shares):  # each "process" records its sum; the last one gets them all
            drift = AdaptiveDiagonalDrift((2,))
            approximation = StochasticApproximation(drift, G, num_trajectories=37, batch_size=batch_size)

            def reduce_sum(tensor):
                sums.append(tensor)
                return sum(sums)

            output = approximation.update(
                exact_score(drift), process_index=index, num_processes=shares, reduce_sum=reduce_sum
            )
        return output.lam

    whole = stage(None, 1)
    for batch_size, shares in ((5, 1), (None, 2), (3, 3)):
        torch.testing.assert_close(stage(batch_size, shares), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("update", ["gradient", "ipf"])
def test_noise_is_the_same_however_much_is_drawn_at_once(update, monkeypatch):
    def stage(at_once):
        monkeypatch.setattr(stochastic_approximation, "NOISE_VALUES", at_once)
        drift = AdaptiveDiagonalDrift((4, 2, 2))
        settings = {"zeta": 1.0, "num_trajectories": 5}
        approximation = StochasticApproximation(drift, G, update=update, **settings)
        data = torch.ones(1, 4, 2, 2) if update == "ipf" else None  # whose paths are simulated too
        return approximation.update(lambda x, k: -x + 0.1 * x.square(), data=data)

    whole = stage(1 << 20)
    for at_once in (1, 40):  # of the 16 of a time
        parts = stage(at_once)
        assert torch.equal(parts.score_x, whole.score_x) and torch.equal(parts.lam, whole.lam)


def test_shared_lambda_averages_over_its_dimensions():
    """One lambda per channel of an image moves as the mean over that channel's pixels."""

    def update(lambda_shape):
        drift = AdaptiveDiagonalDrift((3, 4, 4), lambda_shape)
        approximation = StochasticApproximation(drift, G, num_trajectories=16, num_steps=20)
        return approximation.update(lambda x, k: -x / 3).score_x

    per_pixel = update((3, 4, 4))
    torch.testing.assert_close(update((3, 1, 1)), per_pixel.mean((1, 2), keepdim=True), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(update((1, 1, 1)), per_pixel.mean().reshape(1, 1, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prior", ["standard", "conditional", "marginal"])
def test_simulation_starts_from_its_prior(prior):
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor([0.5, 2.0]))
    drift.data_mean.copy_(torch.tensor([4.0, -4.0]))
    drift.data_variance.copy_(torch.tensor([9.0, 1.0]))
    lam, starts = drift.lam.clone(), []
    approximation = StochasticApproximation(drift, G, num_trajectories=4000, num_steps=10, prior=prior)
    approximation.update(lambda x, k: starts.append(x) or -x)
    start = starts[0].double()
    a, s2 = torch.exp(-lam * G[-1] / 2), (1 - torch.exp(-lam * G[-1])) / lam
    mean, variance = {
        "standard": (0 * a, torch.ones(2)),
        "conditional": (0 * a, s2),
        "marginal": (a * torch.tensor([4.0, -4.0]), a**2 * torch.tensor([9.0, 1.0]) + s2),
    }[prior]
    assert ((start.mean(0) - mean) / (variance / 4000).sqrt()).abs().max() < 4
    assert (start.var(0) / variance - 1).abs().max() < 4 * (2 / 4000) ** 0.5


@pytest.mark.parametrize(
    "setting",
    [
        {"zeta": 0.0},
        {"zeta": 1.5},
        {"zeta_placement": "elsewhere"},
        {"prior": "uniform"},
        {"num_trajectories": 0},
        {"num_steps": 101},
        {"step_power": 0.5},
        {"step_scale": -1.0},
        {"step_count": "steps"},
        {"clip": 0.0},
    ],
)
def test_bad_settings_name_themselves(setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}`"):
        StochasticApproximation(AdaptiveDiagonalDrift((2,)), G, **setting)


def test_bad_table():
    with pytest.raises(ValueError, match="integrated_beta"):
        StochasticApproximation(AdaptiveDiagonalDrift((2,)), G.flip(0))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        StochasticApproximation(AdaptiveDiagonalDrift((2,)), torch.cat([G[:-1], torch.tensor([torch.inf]).double()]))


@pytest.mark.parametrize("step_count", ["stages", "sign_changes"])
def test_stages_go_on_from_a_state(step_count):
    def fresh():
        drift = AdaptiveDiagonalDrift((2,))
        settings = {"num_trajectories": 8, "num_steps": 20, "step_count": step_count, "clip": 10.0}
        return StochasticApproximation(drift, G, **settings)

    def run(approximation, stages):
        return [approximation.update(exact_score(approximation.drift)).lam for _ in range(stages)][-1]

    whole, first, second = fresh(), fresh(), fresh()
    expected = run(whole, 6)
    run(first, 4)
    second.drift.load_state_dict(first.drift.state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, 2), expected) and second.num_stages == 6


def test_the_error_falls_with_the_step_size():
    """Theorem 2 as it should read: E|log lambda - root|^2 tends to eta Var / (2 m), with m the slope at the root.

    Every dimension is a replicate.
    """
    replicates, variance = 256, 0.5
    drift = AdaptiveDiagonalDrift((replicates,))
    settings = {"num_trajectories": 4, "num_steps": 25, "step_scale": 6.0, "step_offset": 20.0}

    def score(x, k):
        a2, s2 = process.mean_scale(drift.lam, G[k]) ** 2, process.variance(drift.lam, G[k])
        return (-x.double() / (a2 * variance + s2)).float()

    def field(log_lambda, num_trajectories=4000):
        """The mean gradient at one lambda for all dimensions."""
        drift.set_lambda(math.exp(log_lambda))
        at = StochasticApproximation(drift, G, clip=1e9, **settings | {"num_trajectories": num_trajectories})
        return float(at.update(score).gradient.mean())

    low, high = math.log(0.1), math.log(5.0)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if field(middle, 400) > 0 else (low, middle)
    root = (low + high) / 2
    slope = (field(root - 0.2) - field(root + 0.2)) / 0.4
    drift.set_lambda(math.exp(root))
    noise = float(StochasticApproximation(drift, G, clip=1e9, **settings).update(score).gradient.var())

    drift.set_lambda(math.exp(root))
    approximation = StochasticApproximation(drift, G, clip=1e9, **settings)
    etas, errors = [], []
    for stage in range(2000):
        output = approximation.update(score)
        if stage >= 300:
            etas.append(approximation.step_size(int(drift.num_updates)))
            errors.append(float((output.lam.log() - root).square().mean()))
    etas, errors = torch.tensor(etas).log(), torch.tensor(errors).log()
    centred = etas - etas.mean()
    rate = float((centred * errors).sum() / centred.square().sum())
    assert 0.8 < rate < 1.2
    assert float((errors - etas).exp().mean()) == pytest.approx(noise / (2 * slope), rel=0.3)


def first_stage(basis, num_times, factor, until, calibrate):
    """Of IPF, with a score that is too large by a factor before a training time; with samples of the data or not."""
    data = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) * VARIANCE.sqrt().float()
    one = torch.ones((), dtype=torch.float64)
    drift = AdaptiveDiagonalDrift((2,), basis=basis, num_times=num_times)
    drift.data_variance.copy_(VARIANCE)

    def score(x, k):
        variance = process.mean_scale(one, G[k]) ** 2 * VARIANCE + process.variance(one, G[k])
        return (-(factor if k < until else 1.0) * x.double() / variance).float()

    approximation = StochasticApproximation(drift, G, zeta=1.0, update="ipf", num_trajectories=20_000)
    return approximation.update(score, data=data if calibrate else None)


WAYS_TO_CALIBRATE = pytest.mark.parametrize("basis, num_times", [("identity", None), ("dense", None), ("identity", N)])


@WAYS_TO_CALIBRATE
def test_data_calibrate_a_biased_score(basis, num_times):
    """IPF with a score that is too large near the data, as a network's may be: samples take it out again."""
    exact = first_stage(basis, num_times, 1.0, 10, False).lam
    torch.testing.assert_close(first_stage(basis, num_times, 1.0, 10, True).lam, exact, rtol=0.05, atol=0.05)
    if num_times is not None:
        calibrated, plain = (
            (first_stage(basis, num_times, 1.2, 10, calibrate).lam - exact).abs().mean() for calibrate in (True, False)
        )
        assert calibrated < 0.5 * plain


@WAYS_TO_CALIBRATE
def test_data_divide_the_moment_by_how_much_too_large_the_score_is(basis, num_times):
    """Of a score that is 1.2 times the exact one E[score x] is -1.2 under the forward process, by Stein."""
    calibrated, plain = (first_stage(basis, num_times, 1.2, N, calibrate).score_x for calibrate in (True, False))
    torch.testing.assert_close(1.2 * calibrated, plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("wrong", [lambda x, k: torch.zeros(len(x), 1), lambda x, k: (x, x)])
def test_a_score_of_another_shape_is_refused(wrong):
    """And not broadcast."""
    approximation = StochasticApproximation(AdaptiveDiagonalDrift((2,)), G, num_trajectories=4)
    with pytest.raises(ValueError, match=r"`score`.*\(4, 2\)"):
        approximation.update(wrong)


@pytest.mark.parametrize("prior_variance", [1.0, None])
def test_lambda_over_brownian_motion_carries_the_data_to_the_prior_that_is_named(prior_variance):
    """With zeta 1 and the exact score: to N(0, 1), or to the reference's own end, N(0, g_T)."""
    g = 0.3 * torch.sin(0.5 * torch.pi * T) ** 2
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(3.0)
    settings = {"zeta": 1.0, "variance_exploding": True, "prior_variance": prior_variance, "num_trajectories": 2000}
    approximation = StochasticApproximation(drift, g, **settings)
    for _ in range(60):
        approximation.update(lambda x, k: DiagonalGaussian(MEAN, VARIANCE, drift.lam).score(x.double(), g[k]).float())
    _, end = DiagonalGaussian(MEAN, VARIANCE, drift.average()).moments(g[-1])
    wanted = prior_variance or 0.3
    # of the narrow axis the variance cannot rise to 1: lambda sinks instead
    assert abs(float(end[1]) / wanted - 1) < 0.15
    assert (drift.average()[0] < 0.1) == (wanted > 0.9)
