import copy
import dataclasses
import json
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMScheduler, process
from diffusers_vsdm.schedulers.drift_owner import DRIFT_FILE, DRIFT_FOLDER
from diffusers_vsdm.schedulers.grids import TIME_GRIDS
from diffusers_vsdm.schedulers.parameterization import PARAMETERIZATIONS
from diffusers_vsdm.schedulers.scheduling_vsdm import PRIORS
from diffusers_vsdm.schedulers.tables import combine
from diffusers_vsdm.solvers import SOLVERS, Coefficients

from .problems import ANISOTROPIC, scheduler_for


SHAPE = (2, 3, 8, 8)


class Network(torch.nn.Module):
    """A fixed random function of sample and time, bounded as a trained network's output is."""

    def __init__(self, channels=3):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, channels, 3, padding=1)

    @torch.no_grad()
    def forward(self, x, t):
        return torch.tanh(self.layer(x) + float(t) / 1000)


def sample(scheduler, network, steps, seed=0):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    takes_generator = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    if steps is not None:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **takes_generator).prev_sample
    return x


def drifting(shape=(3,), lam=(0.7, 1.9, 1.0), **settings):
    scheduler = VSDMScheduler.from_power_law(clip_sample=False, **settings)
    drift = AdaptiveDiagonalDrift(shape)
    drift.set_lambda(torch.tensor(lam).reshape(shape))
    scheduler.set_drift(drift)
    return scheduler


def quiet(scheduler):
    """As pipelines do: without it the scheduler warns that its prior went unused."""
    _ = scheduler.init_noise_sigma
    return scheduler


# The neutral process is DDPM ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"},
        {"beta_schedule": "sigmoid", "variance_type": "fixed_small_log"},
        {"trained_betas": np.linspace(1e-3, 0.03, 1000, dtype=np.float32)},
        {"prediction_type": "sample", "timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"thresholding": True, "sample_max_value": 1.5},
        {"clip_sample_range": 0.3},
        {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("steps, tolerance", [(25, 2e-5), (1000, 1e-3)])
def test_gives_the_samples_of_ddpm(config, steps, tolerance):
    if steps == 1000:
        config = {key: value for key, value in config.items() if key != "steps_offset"}  # the stock class overruns
    stock = DDPMScheduler(**config)
    ours = VSDMScheduler.from_config(stock.config)
    network = Network()
    expected, actual = sample(stock, network, steps), sample(ours, network, steps)
    assert torch.equal(stock.timesteps, ours.timesteps)
    assert expected.abs().max() > 0.1
    assert (expected - actual).abs().max() < tolerance * max(1.0, float(expected.abs().max()))


def test_a_neutral_drift_changes_nothing():
    stock, network = DDPMScheduler(), Network()
    ours = VSDMScheduler.from_config(stock.config)
    ours.set_drift(AdaptiveDiagonalDrift((3, 8, 8)))
    assert (sample(stock, network, 25) - sample(quiet(ours), network, 25)).abs().max() < 2e-5


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_is_ddpms(variance_type):
    stock = DDPMScheduler(variance_type=variance_type)
    ours = VSDMScheduler.from_config(stock.config)
    network = Network(6)

    def positive(x, t):
        mean, variance = network(x, t).chunk(2, dim=1)
        return torch.cat([mean, variance.abs() * 0.01 if variance_type == "learned" else variance], dim=1)

    # Diffusers draws noise for both halves of the network's output; the mean path is comparable
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    x = torch.randn(SHAPE)
    for t in (900, 500, 100):
        seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
        expected = stock.step(positive(x, t), t, x, generator=seeds[0]).prev_sample
        actual = ours.step(positive(x, t), t, x, generator=seeds[1]).prev_sample
        assert (expected - actual).abs().max() < 2e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_gives_the_samples_of_ddim(prediction_type):
    stock = DDIMScheduler(prediction_type=prediction_type, set_alpha_to_one=True)
    ours = VSDMScheduler.from_config(stock.config, solver="ddim")
    network = Network()
    x = torch.randn(SHAPE)
    stock.set_timesteps(20)
    ours.set_timesteps(20)
    y = x
    for t in stock.timesteps:
        x = stock.step(network(x, t), int(t), x).prev_sample
        y = ours.step(network(y, t), int(t), y).prev_sample
    assert (x - y).abs().max() < 2e-5


@pytest.mark.parametrize("steps", [1, 3, 6, 20])
@pytest.mark.parametrize(
    "solver, stock, orders",
    [
        ("dpmsolver++", DPMSolverMultistepScheduler, (1, 2)),
        ("sde-dpmsolver++", DPMSolverMultistepScheduler, (1, 2)),
        ("unipc", UniPCMultistepScheduler, (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}])
def test_multistep_solvers_give_the_samples_of_their_namesakes(solver, stock, orders, steps, config):
    for order in orders:
        kind = {"algorithm_type": solver} if stock is DPMSolverMultistepScheduler else {}
        theirs = stock(solver_order=order, **kind, **config)
        theirs.set_timesteps(steps)
        ours = VSDMScheduler.from_config(theirs.config, solver=solver, clip_sample=False)
        assert ours.config["solver_order"] == order
        ours.set_timesteps(timesteps=theirs.timesteps.tolist())
        samples = []
        for scheduler in (theirs, ours):
            x, generator = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.Generator()
            draws = {"generator": generator.manual_seed(1)} if solver.startswith("sde") else {}
            for k in scheduler.timesteps:
                x = scheduler.step(torch.tanh(1.3 * x + 0.001 * float(k)), k, x, **draws).prev_sample
            samples.append(x)
        torch.testing.assert_close(*samples, rtol=0, atol=2e-5 * float(samples[0].abs().max()))


def test_a_multistep_run_may_start_late_and_is_taken_in_order():
    scheduler = drifting(solver="unipc", solver_order=3)
    scheduler.set_timesteps(10)
    net = lambda x, k: torch.tanh(x + 0.01 * float(k))  # noqa: E731
    start = torch.randn(4, 3)

    def tail(x, times):
        for k in times:
            x = scheduler.step(net(x, k), k, x).prev_sample
        return x

    scheduler.set_begin_index(6)
    late = tail(start, scheduler.timesteps[6:])
    scheduler.set_timesteps(timesteps=scheduler.timesteps[6:].tolist())
    assert torch.equal(late, tail(start, scheduler.timesteps))
    scheduler.set_timesteps(10)
    scheduler.step(start, scheduler.timesteps[0], start)
    with pytest.raises(ValueError, match="out of turn"):
        scheduler.step(start, scheduler.timesteps[0], start)
    with pytest.raises(ValueError, match="`solver_order`"):
        VSDMScheduler(solver="unipc", solver_order=4)


def test_add_noise_and_velocity_are_ddpms():
    stock = DDPMScheduler()
    ours = VSDMScheduler.from_config(stock.config)
    x, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 987])
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.get_velocity(x, noise, t), stock.get_velocity(x, noise, t), rtol=0, atol=2e-5)


# The process with a drift ------------------------------------------------------------------------------------


def test_add_noise_has_the_moments_of_corollary_1():
    scheduler = drifting()
    x0 = torch.tensor([1.0, -2.0, 3.0]).expand(100_000, 3)
    k = 63
    x = scheduler.add_noise(x0, torch.randn(x0.shape), torch.tensor([k]))
    t = torch.tensor((k + 1) / 100, dtype=torch.float64)
    g = process.power_law_integrated_beta(t, 0.1, 10.0, 1.7)
    lam = torch.tensor([0.7, 1.9, 1.0], dtype=torch.float64)
    mean, variance = process.mean_scale(lam, g) * x0[0], process.variance(lam, g)
    assert ((x.mean(0) - mean) / (variance / len(x)).sqrt()).abs().max() < 4
    assert (x.var(0) / variance - 1).abs().max() < 4 * (2 / len(x)) ** 0.5


@given(
    name=st.sampled_from(sorted(PARAMETERIZATIONS)),
    lam=st.lists(st.floats(0.05, 8), min_size=3, max_size=3),
    k=st.integers(0, 99),
)
@settings(deadline=None)
def test_parameterizations_invert(name, lam, k):
    """From the right output every prediction type gives the same data, noise and score, at any lambda."""
    scheduler = quiet(drifting(lam=lam, prediction_type=name, solver="ddim"))
    x0, eps = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    x = scheduler.add_noise(x0, eps, torch.tensor([k]))
    a, s = scheduler.marginal_scales(x0, torch.tensor([k]))
    network = scheduler.parameterization
    output = network.target(x0, eps, a, s)
    torch.testing.assert_close(scheduler.get_score(output, k, x), -eps / s, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scheduler.step(output, k, x).pred_original_sample, x0, rtol=1e-4, atol=1e-5)
    shifted = network.eps(output + 1e-3, x, a, s) - network.eps(output, x, a, s)
    expected = 1e-3 * network.eps_terms(a, s)[1]
    torch.testing.assert_close(shifted.abs(), expected.expand_as(shifted).abs(), rtol=1e-5, atol=1e-12)


def test_scaled_input_is_the_sample():
    x = torch.randn(SHAPE)
    assert VSDMScheduler().scale_model_input(x, 0.0) is x and VSDMScheduler().scale_model_input(x) is x
    with pytest.raises(ValueError, match="timestep"):
        VSDMScheduler(prediction_type="edm").scale_model_input(x)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-3, 20), min_size=4, max_size=4),
    st.floats(0.1, 10),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([1, 25]),
)
def test_scales_of_every_dimension_are_those_of_double_precision(lam, beta_max, seed, dtype, repeats):
    """With few rates, from a table, and with many, without."""
    d = 4 * repeats
    scheduler = VSDMScheduler.from_power_law(beta_max=beta_max)
    drift = AdaptiveDiagonalDrift((d,))
    drift.set_lambda(torch.tensor(lam * repeats, dtype=torch.float64))
    scheduler.set_drift(drift)
    k = torch.randint(100, (16,), generator=torch.Generator().manual_seed(seed))
    a, s = scheduler.marginal_scales(torch.zeros(16, d, dtype=dtype), k)
    g = scheduler.integrated_beta[k].reshape(-1, 1)
    assert a.dtype == s.dtype == torch.float32
    a, s = (scale.expand(16, d) for scale in (a, s))
    torch.testing.assert_close(a.double(), process.mean_scale(drift.lam, g), rtol=2e-5, atol=1e-38)
    torch.testing.assert_close(s.double(), process.std(drift.lam, g), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_float32(dtype):
    scheduler = quiet(drifting(solver="ddim"))
    outputs = []
    for kind in (torch.float32, dtype):
        scheduler.set_timesteps(20)
        x = torch.linspace(-2, 2, 12).reshape(4, 3).to(kind)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
            assert x.dtype == kind
        outputs.append(x.float())
    assert (outputs[0] - outputs[1]).abs().max() < 4 * torch.finfo(dtype).eps * outputs[0].abs().max()


def test_changing_the_drift_in_place_changes_the_tables():
    scheduler = drifting()
    x, noise, k = torch.ones(1, 3), torch.ones(1, 3), torch.tensor([50])
    before = scheduler.add_noise(x, noise, k)
    scheduler.step(noise, 50, x)
    scheduler.drift.set_lambda(3.0)
    after = scheduler.add_noise(x, noise, k)
    assert (before - after).abs().min() > 0.01
    fresh = drifting(lam=(3.0, 3.0, 3.0))
    assert torch.equal(after, fresh.add_noise(x, noise, k))
    step, again = scheduler.step(noise, 50, x), fresh.step(noise, 50, x)
    assert torch.equal(step.pred_original_sample, again.pred_original_sample)


# Prior -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior_type", PRIORS)
def test_prior_is_the_process_at_its_first_timestep_or_standard(prior_type):
    scheduler = scheduler_for(ANISOTROPIC, prior_type=prior_type)
    scheduler.set_timesteps(10)
    g = scheduler.integrated_beta[int(scheduler.timesteps[0])]
    mean, variance = {
        "marginal": ANISOTROPIC.moments(g),
        "conditional": (torch.zeros(3), process.variance(ANISOTROPIC.lam, g)),
        "standard": (torch.zeros(3), torch.ones(3)),
    }[prior_type]
    n = 50_000
    x = scheduler.sample_prior((n, 3), generator=torch.Generator().manual_seed(0))
    assert ((x.mean(0) - mean) / (variance / n).sqrt()).abs().max() < 4
    assert (x.var(0) / variance - 1).abs().max() < 4 * (2 / n) ** 0.5
    std = 1.0 if prior_type == "standard" else variance.sqrt().float()
    torch.testing.assert_close(scheduler.init_noise_sigma, std)


GRIDS = [grid for grid in TIME_GRIDS if grid != "spacing"]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("time_grid", GRIDS)
def test_fractional_grids_fall_from_noise_to_data(time_grid, final):
    scheduler = drifting(time_grid=time_grid, final_sigmas_type=final, solver="ddim")
    net = lambda x, k: torch.tanh(x + 0.01 * float(k))  # noqa: E731
    for steps in (1, 2, 7, 300):  # more than there are training times
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps and scheduler.timesteps[0] == 99
        assert (scheduler.timesteps.diff() < 0).all()
        assert scheduler.previous_timestep(scheduler.timesteps[-1]) == (-1 if final == "zero" else 0)
        x = quiet(scheduler).sample_prior((2, 3), generator=torch.Generator().manual_seed(0))
        for k in scheduler.timesteps:
            x = scheduler.step(net(x, k), k, x).prev_sample
        assert x.isfinite().all()


@pytest.mark.parametrize("time_grid", ["log_snr_mean", "log_snr_largest", "log_snr_smallest"])
def test_log_snr_grids_are_uniform_in_what_they_say(time_grid):
    scheduler = drifting(time_grid=time_grid)
    scheduler.set_timesteps(9)
    a, s = scheduler.marginal_scales(torch.zeros(9, 3, dtype=torch.float64), scheduler.timesteps)
    log_snr = 2 * (a / s).log()
    kind = time_grid.removeprefix("log_snr_")
    clock = {"mean": log_snr.mean(1), "largest": log_snr.amax(1), "smallest": log_snr.amin(1)}[kind]
    np.testing.assert_allclose(clock.diff(), clock.diff().mean(), rtol=0.02)  # between table entries it is not exact


def test_fractional_times_lie_between_whole_ones():
    for scheduler in (drifting(), VSDMScheduler()):
        like = torch.zeros(3, 3)
        a, s = scheduler.marginal_scales(like, torch.tensor([40.0, 40.5, 41.0]))
        for scale, whole in zip((a, s), scheduler.marginal_scales(like, torch.tensor([40, 40, 41])), strict=True):
            torch.testing.assert_close(scale[[0, 2]], whole[[0, 2]])
            assert ((scale[1] - scale[0]) * (scale[2] - scale[1]) > 0).all()
    with pytest.raises(ValueError, match="needs a signal at every time"):
        VSDMScheduler(rescale_betas_zero_snr=True, time_grid="karras").set_timesteps(5)


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # of Stable Diffusion


@pytest.mark.parametrize("basis", ["dct", "identity"])
def test_fitted_moments_start_a_stock_model_from_its_own_law(basis, tmp_path):
    """At the table's last time, where there is signal left; and the steps stay those of the stock scheduler."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(4000, 3, 8, 8, generator=generator) * 0.3 + 4 * torch.randn(4000, 1, 1, 1, generator=generator)
    stock = DDPMScheduler(**SD)
    scheduler = VSDMScheduler.from_config(stock.config)
    scheduler.fit_moments(data.split(500), basis=basis)
    scheduler.set_timesteps(10)
    k = int(scheduler.timesteps[0])
    noised = stock.add_noise(data, torch.randn(data.shape, generator=generator), torch.full((4000,), k))
    start = scheduler.sample_prior(data.shape, generator=generator)
    assert start.std() == pytest.approx(float(noised.std()), rel=0.02)
    brightness = [x.mean((1, 2, 3)).std() for x in (start, noised)]
    # the pixels of an image go together, which only frequencies tell
    assert (brightness[0] / brightness[1] > 0.97) == (basis == "dct")
    x, output = start[:5], torch.randn(5, 3, 8, 8)
    stock.set_timesteps(10)
    draws = [{"generator": torch.Generator().manual_seed(1)} for _ in range(2)]
    expected = stock.step(output, k, x, **draws[0]).prev_sample
    torch.testing.assert_close(scheduler.step(output, k, x, **draws[1]).prev_sample, expected, rtol=1e-4, atol=1e-4)
    scheduler.save_pretrained(tmp_path)
    loaded = VSDMScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(10)
    again = [s.sample_prior((2, 3, 8, 8), generator=torch.Generator().manual_seed(3)) for s in (scheduler, loaded)]
    assert loaded.config["prior_type"] == "marginal" and torch.equal(*again)
    swapped = VSDMScheduler.from_config(scheduler.config, solver="unipc")
    assert swapped.config["prior_type"] == "marginal" and swapped.drift.is_neutral


def test_prior_does_not_depend_on_the_batch_split():
    scheduler = scheduler_for(ANISOTROPIC)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    whole = scheduler.sample_prior((4, 3), generator=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    parts = [scheduler.sample_prior((2, 3), generator=generators[i : i + 2]) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_that_ignores_the_prior_warns_once():
    scheduler = drifting()
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="sample_prior"):
        scheduler.step(x, scheduler.timesteps[0], x)
    used = drifting()
    used.set_timesteps(5)
    prior = used.sample_prior((2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(5)
        scheduler.step(x, scheduler.timesteps[0], x)
        used.step(prior, used.timesteps[0], prior)


# Timesteps ---------------------------------------------------------------------------------------------------


def test_power_law_starts_and_ends_where_the_paper_says():
    scheduler = VSDMScheduler.from_power_law(0.1, 20.0, 1.7, 100)
    k = torch.arange(100)
    t = (k.double() + 1) / 100
    expected = process.power_law_integrated_beta(t, 0.1, 20.0, 1.7)
    torch.testing.assert_close(scheduler.integrated_beta, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        scheduler.beta_at(k).double(), process.power_law_beta(t - 0.005, 0.1, 20.0, 1.7), rtol=5e-3, atol=2e-4
    )
    # stock schedulers understand the table
    torch.testing.assert_close(
        DDPMScheduler.from_config(scheduler.config).alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=0
    )


def test_final_sigmas_type_ends_at_the_first_training_time():
    scheduler = drifting(solver="euler", final_sigmas_type="sigma_min", timestep_spacing="linspace")
    scheduler.set_timesteps(99)
    assert scheduler.timesteps.tolist() == list(range(99, 0, -1))
    assert scheduler.previous_timestep(1) == 0
    scheduler.set_timesteps(9)
    assert scheduler.timesteps.tolist() == list(range(99, 0, -11))
    with pytest.raises(ValueError, match="between 1 and 99"):
        scheduler.set_timesteps(100)
    with pytest.raises(ValueError, match="descending order and end above 0"):
        scheduler.set_timesteps(timesteps=[50, 0])


def test_heun_repeats_timesteps_as_diffusers_does():
    scheduler = VSDMScheduler(solver="heun", clip_sample=False)
    scheduler.set_timesteps(4)
    assert scheduler.order == 2
    assert scheduler.timesteps.tolist() == [750, 500, 500, 250, 250, 0, 0]
    # a start in the middle takes the position from which a step begins
    assert scheduler.index_for_timestep(500) == 2
    x, outputs = torch.randn(SHAPE), []
    for restart in (True, False):
        scheduler.set_timesteps(4)
        if restart:
            scheduler.set_begin_index(2)
        y = x
        for t in scheduler.timesteps[2:]:
            y = scheduler.step(0.5 * y, t, y).prev_sample
        outputs.append(y)
    assert torch.equal(*outputs)


def test_previous_timestep():
    scheduler = VSDMScheduler()
    assert scheduler.previous_timestep(500) == 499
    scheduler.set_timesteps(timesteps=[900, 400, 30])
    assert [scheduler.previous_timestep(t) for t in (900, 400, 30)] == [400, 30, -1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.set_timesteps(1001), "between 1 and 1000"),
        (lambda s: s.set_timesteps(0), "between 1 and 1000"),
        (lambda s: s.set_timesteps(), "exactly one"),
        (lambda s: s.set_timesteps(5, timesteps=[3, 2]), "exactly one"),
        (lambda s: s.set_timesteps(timesteps=[5, 5]), "descending"),
        (lambda s: s.set_timesteps(timesteps=[1000, 5]), "in 0 to 999"),
        (lambda s: s.set_timesteps(timesteps=[50, -0.5]), "in 0 to 999"),
        (lambda s: s.set_timesteps(2.5), "`num_inference_steps` must be a whole number"),
        (lambda s: s.set_timesteps(timesteps=[float("nan")]), "list of training timesteps"),
        (lambda s: s.set_timesteps(timesteps=[999.5]), "in 0 to 999"),
        (lambda s: s.set_timesteps(timesteps=[]), "empty"),
        (lambda s: s.step(torch.zeros(SHAPE), 1000, torch.zeros(SHAPE)), "`timestep` 1000"),
        (lambda s: s.step(torch.zeros(SHAPE), -1, torch.zeros(SHAPE)), "`timestep` -1"),
        (lambda s: s.step(torch.zeros(2, 3), 5, torch.zeros(SHAPE)), "must agree"),
        (lambda s: s.add_noise(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.tensor([1000])), "lie in"),
        (lambda s: s.add_noise(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.tensor([-1])), "lie in"),
        (lambda s: s.add_noise(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.tensor([999.5])), "lie in"),
        (lambda s: s.set_begin_index(1000), "begin_index"),
        (lambda s: s.step(torch.zeros(SHAPE), 500.7, torch.zeros(SHAPE)), "`timestep` 500.7"),
        (lambda s: s.add_noise(torch.zeros(SHAPE), torch.zeros(1, 3, 8, 8), torch.tensor([1])), "must agree"),
        (lambda s: s.sample_prior(SHAPE), "marginal"),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(VSDMScheduler(prior_type="marginal"))


def test_calls_out_of_turn_are_noticed():
    x = torch.zeros(SHAPE)
    scheduler = VSDMScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="out of turn: the next one of this run is 700"):
        scheduler.step(x, 900, x)
    heun = VSDMScheduler(solver="heun")
    heun.set_timesteps(10)
    heun.step(x, 900, x)
    with pytest.raises(ValueError, match="out of turn"):
        heun.step(x, 700, x)
    with pytest.raises(ValueError, match="begin_index"):
        heun.set_begin_index(1)


def test_a_run_that_was_broken_off_leaves_nothing_behind():
    x, scheduler = torch.randn(SHAPE), VSDMScheduler(solver="heun", clip_sample=False)
    scheduler.set_timesteps(4)
    clean = [scheduler.step(torch.tanh(x), t, x).prev_sample for t in scheduler.timesteps[:2]]
    for restart in (lambda: scheduler.set_timesteps(4), lambda: scheduler.set_begin_index(0)):
        restart()
        scheduler.step(x, 750, 3 * x)  # broken off in the middle of a step
        restart()
        again = [scheduler.step(torch.tanh(x), t, x).prev_sample for t in scheduler.timesteps[:2]]
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_underflow_is_reported_and_other_predictions_go_on():
    """lambda 20 over DDPM's table: no float32 can tell the data from x_T by its noise."""
    for prediction_type, solver, works in (
        ("epsilon", "ddpm", False),
        ("epsilon", "heun", True),
        ("v_prediction", "ddpm", True),
        ("sample", "ddim", True),
    ):
        scheduler = VSDMScheduler(prediction_type=prediction_type, solver=solver, clip_sample=False)
        drift = AdaptiveDiagonalDrift((3, 8, 8))
        drift.set_lambda(20.0)
        scheduler.set_drift(drift)
        scheduler.set_timesteps(20)
        x = scheduler.sample_prior(SHAPE)
        if works:
            assert scheduler.step(0.5 * x, scheduler.timesteps[0], x).prev_sample.isfinite().all()
        else:
            with pytest.raises(ValueError, match="no signal left"):
                scheduler.step(0.5 * x, scheduler.timesteps[0], x)


def test_a_step_too_many():
    scheduler = VSDMScheduler()
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(0)
    x = torch.zeros(SHAPE)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="more often"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize(
    "setting",
    [
        "solver",
        "prediction_type",
        "prior_type",
        "timestep_spacing",
        "beta_schedule",
        "final_sigmas_type",
    ],
)
def test_unknown_settings_name_themselves(setting):
    with pytest.raises(ValueError, match=f"`{setting}` must be one of"):
        VSDMScheduler(**{setting: "nonsense"})


def test_what_the_stock_class_takes_is_taken_with_a_warning(caplog):
    logger = diffusers.utils.logging.get_logger("diffusers_vsdm.schedulers.scheduling_vsdm")
    logger.addHandler(caplog.handler)
    try:
        assert len(VSDMScheduler(trained_betas=[0.1, 0.2])) == 2 and "the table counts" in caplog.text
        VSDMScheduler(variance_type="other")
        assert "taken as 'fixed_small'" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
)
def test_variance_by_its_private_name_is_ddpms(variance_type):
    stock = DDPMScheduler(variance_type=variance_type)
    ours = VSDMScheduler.from_config(stock.config)
    predicted = torch.rand(1, 3, 8, 8) if variance_type.startswith("learned") else None
    for scheduler in (stock, ours):
        scheduler.set_timesteps(100)
    for k in (990, 500, 10):
        expected = stock._get_variance(k, predicted_variance=predicted)
        torch.testing.assert_close(ours._get_variance(k, predicted), expected, rtol=2e-4, atol=1e-9)


def test_other_bad_settings():
    with pytest.raises(ValueError, match="beta_min"):
        VSDMScheduler.from_power_law(beta_min=0.0)
    with pytest.raises(ValueError, match="betas must lie"):
        VSDMScheduler(num_train_timesteps=2, trained_betas=[0.1, -0.2])
    with pytest.raises(ValueError, match="drift is for"):
        drifting().step(torch.zeros(1, 4), 0, torch.zeros(1, 4))
    with pytest.raises(TypeError, match="AdaptiveDiagonalDrift"):
        VSDMScheduler().set_drift(1.0)
    epsilon = VSDMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="no signal left"):
        epsilon.step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE))
    euler = VSDMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", solver="euler")
    with pytest.raises(ValueError, match="no signal left"):
        euler.step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", list(PARAMETERIZATIONS))
def test_zero_terminal_snr_is_sampled_or_refused(solver, prediction_type):
    """A point mass of data: every prediction is exact, so that what a solver accepts must arrive there."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = VSDMScheduler(**settings, solver=solver, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    data, x = torch.full(SHAPE, 0.7), torch.randn(SHAPE)
    refused = prediction_type in ("epsilon", "score") or solver in ("euler", "euler-maruyama", "heun", "deis", "ipndm")
    for k in scheduler.timesteps:
        a, s = scheduler.marginal_scales(x, k)
        eps = (x - a * data) / s
        output = scheduler.parameterization.target(data, eps, a, s)
        if refused:
            with pytest.raises(ValueError, match="no signal left"):
                scheduler.step(output, k, x)
            break
        x = scheduler.step(output, k, x).prev_sample
        assert x.isfinite().all()
    if not refused:
        torch.testing.assert_close(x, data, rtol=1e-4, atol=1e-4)


def test_tensors_of_different_types_and_devices():
    """Types are mixed as in Diffusers: the sample's is kept. Devices are not."""
    scheduler = VSDMScheduler()
    x, half = torch.randn(SHAPE), torch.randn(SHAPE, dtype=torch.float16)
    times = torch.tensor([10])
    assert scheduler.step(half, 999, x).prev_sample.dtype == scheduler.add_noise(x, half, times).dtype == x.dtype
    assert scheduler.step(x, 999, half).prev_sample.dtype == scheduler.add_noise(half, x, times).dtype == half.dtype
    for call in (
        lambda: scheduler.step(x.to("meta"), 999, x),
        lambda: scheduler.step(x, 999, x.to("meta")),
        lambda: scheduler.add_noise(x, x.to("meta"), times),
        lambda: scheduler.add_noise(x.to("meta"), x, times),
    ):
        with pytest.raises(ValueError, match="device"):
            call()


# The drift travels -------------------------------------------------------------------------------------------


def lam_of(scheduler):
    return None if scheduler.drift is None else scheduler.drift.lam.tolist()


LAM = [0.7000000000000001, 1.9, 1 / 3]


def test_drift_survives_every_way_of_carrying_a_scheduler(tmp_path):
    scheduler = drifting()
    scheduler.drift.set_lambda(torch.tensor(LAM, dtype=torch.float64))
    scheduler.save_pretrained(tmp_path / "scheduler")
    carried = {
        "from_pretrained": VSDMScheduler.from_pretrained(tmp_path / "scheduler"),
        "subfolder": VSDMScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        "from_config": VSDMScheduler.from_config(scheduler.config, solver="euler"),
        "from_config of from_pretrained": VSDMScheduler.from_config(
            VSDMScheduler.from_pretrained(tmp_path / "scheduler").config
        ),
        "drift=": VSDMScheduler.from_config(json.loads(scheduler.to_json_string()), drift=scheduler.drift),
        "deepcopy": copy.deepcopy(scheduler),
        "pickle": pickle.loads(pickle.dumps(scheduler)),
    }
    for way, other in carried.items():
        assert lam_of(other) == LAM, way
        assert other.config["drift_sha256"] == scheduler.config["drift_sha256"], way
        other.drift.set_lambda(2.0)
        assert lam_of(scheduler) == LAM, f"{way} shares its drift"
    assert carried["from_config"].config["solver"] == "euler"


def test_saving_over_an_older_scheduler_leaves_none_of_its_drift(tmp_path):
    drifting().save_pretrained(tmp_path)
    VSDMScheduler().save_pretrained(tmp_path)
    assert not (tmp_path / DRIFT_FOLDER / DRIFT_FILE).exists()
    assert lam_of(VSDMScheduler.from_pretrained(tmp_path)) is None


def test_the_file_is_nested_in_a_dotted_folder(tmp_path):
    drifting().save_pretrained(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["scheduler_config.json", "vsdm.drift/drift.safetensors"]


def test_digest_follows_the_live_drift():
    scheduler = drifting()
    first = scheduler.config["drift_sha256"]
    scheduler.drift.set_lambda(2.0)
    assert scheduler.config["drift_sha256"] not in (None, first)
    scheduler.set_drift(None)
    assert scheduler.config["drift_sha256"] is None
    assert lam_of(VSDMScheduler.from_config(scheduler.config)) is None


def test_a_digest_without_its_drift_is_refused(tmp_path):
    scheduler = drifting()
    plain = json.loads(json.dumps(scheduler.config))
    with pytest.raises(ValueError, match="learned drift"):
        VSDMScheduler.from_config(plain)
    assert lam_of(VSDMScheduler.from_config(plain, drift_sha256=None)) is None
    scheduler.save_pretrained(tmp_path)
    (tmp_path / DRIFT_FOLDER / DRIFT_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        VSDMScheduler.from_pretrained(tmp_path)
    assert lam_of(VSDMScheduler.from_pretrained(tmp_path, drift_sha256=None)) is None


def test_a_damaged_or_foreign_drift_file_is_refused(tmp_path):
    scheduler = drifting()
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / DRIFT_FOLDER / DRIFT_FILE
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(content[:-3]))
    with pytest.raises(ValueError, match="damaged"):
        VSDMScheduler.from_pretrained(tmp_path)
    content[-1] ^= 1  # a number is changed: a valid file, but another drift
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="not the one|negative lambda"):
        VSDMScheduler.from_pretrained(tmp_path)


def test_a_stock_class_warns_about_the_lost_drift(caplog):
    scheduler = drifting()
    assert not hasattr(diffusers, "VSDMScheduler")
    logger = diffusers.utils.logging.get_logger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        for stock in (DDPMScheduler, DPMSolverMultistepScheduler):
            caplog.clear()
            stock.from_config(scheduler.config)
            assert "drift_sha256" in caplog.text and "not expected" in caplog.text
        caplog.clear()
        DDIMPipeline(UNet2DModel(sample_size=8), scheduler)  # puts a DDIMScheduler in its place
        assert "drift_sha256" in caplog.text and "not expected" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_takes_the_saved_configuration_of_every_compatible_class(tmp_path):
    tried = 0
    for name in VSDMScheduler._compatibles:
        try:
            stock = getattr(diffusers, name)()
        except (AttributeError, ImportError):  # wants a package that is not there
            continue
        stock.save_pretrained(tmp_path / name)
        loaded = type(stock).from_pretrained(tmp_path / name)
        assert VSDMScheduler.from_config(loaded.config).config["solver"] == "ddpm"
        tried += 1
    assert tried > 8


def test_foreign_configurations_keep_their_keys_and_get_our_default_solver():
    stock = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    ours = VSDMScheduler.from_config(stock.config)
    assert ours.config["solver"] == "ddpm"
    back = DPMSolverMultistepScheduler.from_config(ours.config)
    assert back.config["algorithm_type"] == "sde-dpmsolver++" and back.config["solver_order"] == 3


@pytest.mark.parametrize("stock", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_stock_schedulers_run_from_a_saved_configuration_of_ours(stock, tmp_path):
    VSDMScheduler(solver="trig").save_pretrained(tmp_path)
    scheduler = stock.from_pretrained(tmp_path)
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE)
    for k in scheduler.timesteps:
        x = scheduler.step(0.1 * x, k, x).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lam", [1.0, (0.7, 1.9, 1.0)])
@pytest.mark.parametrize("solver", ["ddpm", "heun", "unipc", "trig"])
def test_the_update_compiles_as_one_graph(solver, lam, backend):
    """A step is one pure function of numbers and tensors; `inductor` needs a C++ compiler."""
    scheduler = drifting(solver=solver, lam=lam if isinstance(lam, tuple) else (lam,) * 3)
    torch.compiler.reset()
    compiled = torch.compile(combine, fullgraph=True, backend=backend)
    values = {field.name: torch.randn(4, 3) for field in dataclasses.fields(Coefficients)}
    for call in scheduler._calls(torch.device("cpu"), torch.float32)[:3]:
        torch.testing.assert_close(compiled(call.terms, values), combine(call.terms, values))
