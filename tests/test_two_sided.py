"""Processes with networks on both sides, where the bridge is known: between Gaussians."""

import copy
import math

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config

from diffusers_vsdm import AdaptiveDiagonalDrift, BridgePipeline, MLPModel, VSDMPipeline, VSDMScheduler
from diffusers_vsdm.bridges import GaussianSchrodingerBridge, TwoSidedProcess
from diffusers_vsdm.models import build_model
from diffusers_vsdm.schedulers.parameterization import PARAMETERIZATIONS
from diffusers_vsdm.solvers import SOLVERS


MEAN, COVARIANCE = torch.tensor([0.5, -1.0]), torch.tensor([[3.0, 0.5], [0.5, 0.3]])


def reference(num_train_timesteps=200, **settings):
    """So short a time, g_T = 0.83, that the process does not reach its prior without a control."""
    scheduler = VSDMScheduler.from_power_law(
        0.5, 1.0, 0.5, num_train_timesteps=num_train_timesteps, **{"clip_sample": False} | settings
    )
    drift = AdaptiveDiagonalDrift((2,))
    scheduler.set_drift(drift)
    return scheduler


def reference_of_images(basis, lam):
    scheduler = VSDMScheduler.from_power_law(num_train_timesteps=10, clip_sample=False)
    drift = AdaptiveDiagonalDrift((3, 4, 4), basis=basis)
    drift.set_lambda(0.3 + torch.rand(3, 4, 4) if lam is None else lam)
    scheduler.set_drift(drift)
    return scheduler


def known_bridge(scheduler):
    prior = float(scheduler.prior().std.flatten()[0] ** 2)
    total = float(scheduler.integrated_beta[-1])
    return GaussianSchrodingerBridge(MEAN, COVARIANCE, total, prior_covariance=prior * torch.eye(2)), prior


def policies(scheduler):
    """The bridge's own z, affine in x."""
    bridge, _ = known_bridge(scheduler)

    def forward(x, k):
        matrix, vector = bridge.forward_score(scheduler.integrated_beta_at(k))
        return (torch.einsum("nij,nj->ni", matrix, x.double()) + vector).to(x)

    def backward(x, k):
        g = scheduler.integrated_beta_at(k)
        return torch.cat([bridge.backward_score(x[g == one].double(), one) for one in g.unique()]).to(x)

    return forward, backward


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return MEAN + torch.randn(n, 2, generator=generator) @ torch.linalg.cholesky(COVARIANCE).T


def assert_moments(x, mean, covariance, bias=0.01):
    """Within four standard errors, and the bias of the steps."""
    x = x.double()
    spread = (covariance.diagonal() / len(x)).sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * spread + bias).all(), x.mean(0)
    scale = torch.outer(covariance.diagonal(), covariance.diagonal()).sqrt()
    assert ((x.T.cov() - covariance).abs() < scale * (4 * math.sqrt(2 / len(x)) + bias)).all(), x.T.cov()


def test_both_directions_arrive_at_the_other_end():
    scheduler = reference()
    _, prior = known_bridge(scheduler)
    process = TwoSidedProcess(scheduler, *policies(scheduler))
    n, generator = 40_000, torch.Generator().manual_seed(1)
    path, controls = process.run(data(n), 1, generator)
    assert path.shape == (201, n, 2) and controls.shape == (200, n, 2)
    assert_moments(path[-1], torch.zeros(2), prior * torch.eye(2))
    assert abs(float(path[-1].var(0)[0]) / prior - 1) < 0.05
    uncontrolled = TwoSidedProcess(scheduler, lambda x, k: 0 * x, lambda x, k: 0 * x).run(data(n), 1, generator)[0][-1]
    assert float(uncontrolled.var(0)[0]) / prior > 1.5  # without z it does not arrive
    path, _ = process.run(math.sqrt(prior) * torch.randn(n, 2, generator=generator), -1, generator)
    assert_moments(path[0], MEAN, COVARIANCE)


def test_the_corrector_keeps_the_law_and_finds_it_again():
    """Of the right score: paths that start right stay so, and those from half the variance come nearer to the data."""
    scheduler, n = reference(num_train_timesteps=50), 20_000
    _, prior = known_bridge(scheduler)
    ends = {}
    for corrector_steps in (0, 4):
        process = TwoSidedProcess(scheduler, *policies(scheduler), corrector_steps=corrector_steps)
        for share in (1.0, 0.5):
            generator = torch.Generator().manual_seed(0)
            start = math.sqrt(share * prior) * torch.randn(n, 2, generator=generator)
            ends[corrector_steps, share] = process.run(start, -1, generator)[0][0]
    assert_moments(ends[4, 1.0], MEAN, COVARIANCE, bias=0.03)
    variances = {key: float(x.var(0)[0]) for key, x in ends.items()}
    assert variances[0, 0.5] < 0.8 * COVARIANCE[0, 0] and variances[4, 0.5] > 0.9 * COVARIANCE[0, 0], variances


def test_controls_belong_to_their_points():
    scheduler = reference(num_train_timesteps=20)
    forward, backward = policies(scheduler)
    process = TwoSidedProcess(scheduler, forward, backward, num_steps=5)
    assert process.times.tolist() == [-1, 3, 7, 11, 15, 19]
    for direction, policy in ((1, forward), (-1, backward)):
        path, controls = process.run(data(3), direction, torch.Generator().manual_seed(0))
        for j, k in enumerate(process.times[1:]):
            torch.testing.assert_close(controls[j], policy(path[j + 1], k.expand(3)))
        end = process.arrive(data(3), direction, torch.Generator().manual_seed(0))
        assert torch.equal(end, path[-1 if direction > 0 else 0])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("place", [1, 10, 19])
def test_targets_between_ends_are_z_in_the_mean(direction, place):
    """Regressed on the point, from the bridge's own coupling: z is affine there, as the known one."""
    scheduler, n = reference(num_train_timesteps=20), 200_000
    bridge, prior = known_bridge(scheduler)
    process = TwoSidedProcess(scheduler, *policies(scheduler))
    x_0 = data(n).double()
    of_end = torch.linalg.solve(COVARIANCE.double(), bridge.coupling)
    spread = prior * torch.eye(2, dtype=torch.float64) - bridge.coupling.T @ of_end
    x_T = (x_0 - MEAN) @ of_end + torch.randn(n, 2, dtype=torch.float64) @ torch.linalg.cholesky(spread).T
    x, target, scale = process.matching_target((x_0, x_T), torch.full((n,), place), direction)
    mean, covariance = bridge.marginal(process.g[place])
    assert_moments(x, mean, covariance, bias=0)
    inputs = torch.cat([x, torch.ones(n, 1)], 1)
    expected = policies(scheduler)[direction < 0](x, process.times[place].expand(n))
    found = inputs @ torch.linalg.lstsq(inputs, target).solution
    residual = (target - expected).square().mean(0)
    assert ((found - expected).square().mean(0) < 12 * residual / n * inputs.shape[1]).all()
    assert 0.3 < float((scale * (target - expected)).square().mean()) <= 1.05


@pytest.mark.parametrize("basis", ["dct", "identity"])
@pytest.mark.parametrize("lam", [0.0, 1.0, None])
def test_points_between_ends_have_the_references_law(basis, lam):
    """The ends of its own paths, in its basis and with its rates: the point between is where it would have been."""
    scheduler = reference_of_images(basis, lam)
    drift = scheduler.drift
    n, place = 20_000, 4
    x_0 = torch.randn(3, 4, 4).double().expand(n, 3, 4, 4)
    process = TwoSidedProcess(scheduler, lambda x, k: 0 * x, lambda x, k: 0 * x)
    path, _ = process.run(x_0, 1, torch.Generator().manual_seed(0))
    at = torch.full((n,), place)
    x, target, scale = process.matching_target((x_0, path[-1]), at, -1, torch.Generator().manual_seed(1))
    a, s = scheduler.marginal_scales(x, int(process.times[place]))
    basis = drift.basis()
    between, expected = basis.to_basis(x), (a * basis.to_basis(x_0))[0]
    assert ((between.mean(0) - expected).abs() < 5 * s[0] / n**0.5).all()
    assert ((between.var(0) / s[0] ** 2 - 1).abs() < 5 * (2 / n) ** 0.5).all()
    torch.testing.assert_close(basis.to_basis(target), (a * basis.to_basis(x_0) - between) / s**2, check_dtype=False)
    torch.testing.assert_close((scale + 0 * x)[0], (s + 0 * x)[0], check_dtype=False)


@pytest.mark.parametrize("basis", ["dct", "identity"])
@pytest.mark.parametrize("lam", [0.0, 1.0, None])
def test_without_z_it_is_the_reference(basis, lam):
    """In one step or many: the linear part is exact, in the drift's basis."""
    scheduler = reference_of_images(basis, lam)
    drift = scheduler.drift
    n = 20_000
    x = torch.randn(3, 4, 4).double().expand(n, 3, 4, 4)
    process = TwoSidedProcess(scheduler, lambda x, k: 0 * x, lambda x, k: 0 * x, num_steps=3)
    path, _ = process.run(x, 1, torch.Generator().manual_seed(0))
    a, s = scheduler.marginal_scales(x, 9)
    basis = drift.basis()
    end = basis.to_basis(path[-1])
    expected = (a * basis.to_basis(x))[0]
    assert ((end.mean(0) - expected).abs() < 5 * s[0] / n**0.5).all()
    assert ((end.var(0) / s[0] ** 2 - 1).abs() < 5 * (2 / n) ** 0.5).all()


def test_the_log_ratio_bounds_the_likelihood_and_gets_tight():
    """The mean of -log prior and the log-ratio is above the entropy, and the bridge's own z leave less and less."""
    entropy = 0.5 * float(torch.logdet(2 * math.pi * math.e * COVARIANCE))
    gaps = []
    for num_steps in (25, 100):
        scheduler = reference()
        process = TwoSidedProcess(scheduler, *policies(scheduler), num_steps=num_steps)
        path, _ = process.run(data(20_000).double(), 1, torch.Generator().manual_seed(2))
        values = sum(process.log_ratio(path)) - scheduler.prior().log_prob(path[-1])
        gaps.append(float(values.mean()) - entropy)
        error = float(values.std()) / len(values) ** 0.5
        assert gaps[-1] > -4 * error
    assert gaps[1] < 0.05 + 4 * error and gaps[1] < 0.6 * gaps[0] + 4 * error


def test_the_entropy_of_the_forward_noise_is_minus_the_mean_log_density():
    scheduler = reference()
    process = TwoSidedProcess(scheduler, *policies(scheduler), num_steps=10)
    path, _ = process.run(data(20_000).double(), 1, torch.Generator().manual_seed(2))
    values = process.log_density(path, 1).sum(0)
    assert abs(float(values.mean() + process.entropy(path[0]))) < 4 * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("side", ["forward", "backward"])
def test_paths_that_blow_up_tell_when(side):
    scheduler = reference(num_train_timesteps=10)

    def late(x, k):
        return torch.where(k[:, None] == 6, torch.inf, 0.0).expand_as(x)

    process = TwoSidedProcess(scheduler, late, late)
    first = {"forward": 7, "backward": 5}[side]
    with pytest.raises(FloatingPointError, match=f"{side} paths are not finite at training time {first}"):
        process.run(data(4), 1 if side == "forward" else -1)


def test_moved_grids_visit_all_times_alike():
    process = TwoSidedProcess(reference(100), None, None, num_steps=20)
    generator, visits = torch.Generator().manual_seed(0), torch.zeros(101)
    for _ in range(2000):
        moved = process.moved(generator)
        assert len(moved) == 20 and (moved.times.diff() > 0).all() and moved.times[0] == -1 and moved.times[-1] == 99
        visits[moved.times + 1] += 1
    assert torch.equal(moved.g[1:], moved.scheduler.integrated_beta[moved.times[1:]]) and moved.g[0] == 0
    # each of five or six times of a part in a fifth or a sixth of the runs
    assert visits[1:-1].min() > 270 and visits[1:-1].max() < 480
    whole = TwoSidedProcess(reference(5), None, None)
    assert torch.equal(whole.moved(generator).times, whole.times)
    odd = TwoSidedProcess(reference(23), None, None, num_steps=17)
    for _ in range(100):
        assert (odd.moved(generator).times.diff() > 0).all()


def test_references_that_are_none():
    scheduler = VSDMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="signal"):
        TwoSidedProcess(scheduler, None, None)
    with pytest.raises(ValueError, match="num_steps"):
        TwoSidedProcess(reference(10), None, None, num_steps=11)
    varying = reference(10)
    varying.set_drift(AdaptiveDiagonalDrift((2,), num_times=10))
    with pytest.raises(ValueError, match="lambda for each training time"):
        TwoSidedProcess(varying, None, None)


# The pipeline ------------------------------------------------------------------------------------------------------


class Affine(ModelMixin, ConfigMixin):
    """A network that is right: $z$ of the bridge between Gaussians, or the noise that its $z_b$ stands for."""

    @register_to_config
    def __init__(self, in_channels=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def know(self, scheduler, forward):
        self.policy = policies(scheduler)[0 if forward else 1]
        self.scale = None if forward else scheduler
        return self

    def forward(self, x, timesteps, return_dict=True):
        k = torch.as_tensor(timesteps).reshape(-1).expand(len(x))
        z = self.policy(x, k)
        if self.scale is not None:
            _, s = self.scale.marginal_scales(x, k)
            z = -s * z
        return (z,)


def known_pipeline(**settings):
    scheduler = reference(**settings)
    networks = Affine().know(scheduler, forward=False), Affine().know(scheduler, forward=True)
    pipeline = BridgePipeline(networks[0], scheduler, forward_unet=networks[1])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("solver", ["heun", "dpmsolver++", "unipc", "deis", "ddim", "ddpm", "euler-maruyama"])
def test_every_solver_samples_the_data(solver):
    """Deterministic ones by the probability flow, of which the score is not z_b; stochastic ones backwards.

    Clipping what the flow predicts, which is no estimate of the data, would spoil it.
    """
    clipping = {"clip_sample": True, "clip_sample_range": 2.0}
    pipeline = known_pipeline(solver=solver, **clipping)
    n, steps = 20_000, 150 if solver in ("ddpm", "euler-maruyama", "ddim") else 50
    x = torch.as_tensor(pipeline(n, torch.Generator().manual_seed(0), num_inference_steps=steps).samples)
    assert_moments(x, MEAN, COVARIANCE, bias=0.03)


def test_the_flows_likelihood_is_the_gaussians():
    pipeline = known_pipeline()
    x = data(64)
    law = torch.distributions.MultivariateNormal(MEAN.double(), COVARIANCE.double())
    found = pipeline.log_likelihood(x).value
    # the flow's samples stand at the first training time, where little noise is left
    assert float((found - law.log_prob(x.double())).abs().mean()) < 0.02
    bound = pipeline.likelihood_bound(data(4000), generator=torch.Generator().manual_seed(0))
    assert 0 < float(bound.total.mean()) + float(law.log_prob(data(4000).double()).mean()) < 0.1


def test_encode_arrives_at_the_prior():
    pipeline = known_pipeline()
    prior = pipeline.scheduler.prior()
    latents, path = pipeline.encode(data(20_000), 100, torch.Generator().manual_seed(5))
    assert path.shape == (101, 20_000, 2) and torch.equal(path[0], data(20_000))
    assert_moments(latents, torch.zeros(2), prior.std.square().expand(2).diag(), bias=0.03)


def vector_pipeline(**settings):
    torch.manual_seed(0)
    return VSDMPipeline(MLPModel(2, 100, 16, 1), VSDMScheduler.from_power_law(**settings))


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_forward_network_it_is_the_pipeline_of_its_parts(solver):
    plain = vector_pipeline(solver=solver)
    plain.scheduler.fit_moments(data(100), basis="identity")
    bridge = BridgePipeline(plain.unet, plain.scheduler, plain.normalizer)
    samples = [p(4, torch.Generator().manual_seed(0), num_inference_steps=5).samples for p in (plain, bridge)]
    assert (samples[0] == samples[1]).all()
    x = data(3)
    torch.testing.assert_close(bridge.log_likelihood(x).value, plain.log_likelihood(x).value)


@pytest.mark.parametrize("images", [True, False])
def test_a_trained_pipeline_converts_by_from_pipe(images):
    if images:
        network, scheduler = build_model("tiny", (3, 8, 8), 100), VSDMScheduler.from_power_law(clip_sample=True)
        scheduler.fit_moments(torch.randn(50, 3, 8, 8))
    else:
        network, scheduler = MLPModel(2, 100, 16, 1), VSDMScheduler.from_power_law()
        scheduler.fit_moments(data(50), basis="identity")
    plain = VSDMPipeline(network, scheduler)
    bridge = BridgePipeline.from_pipe(plain)
    assert bridge.unet is network and bridge.scheduler.drift is scheduler.drift and bridge.forward_unet is None
    assert bridge.scheduler.config["clip_sample"] == images
    both = BridgePipeline.from_pipe(plain, forward_unet=copy.deepcopy(network))
    assert not both.scheduler.config["clip_sample"] and scheduler.config["clip_sample"] == images
    assert torch.equal(both.scheduler.drift.lam, scheduler.drift.lam)
    assert isinstance(VSDMPipeline.from_pipe(plain), VSDMPipeline)


def test_bounds_are_those_of_the_class():
    torch.manual_seed(0)
    network = build_model("tiny", (3, 8, 8), 100, num_classes=3)
    pipelines = [
        cls(network, VSDMScheduler.from_power_law(num_train_timesteps=5)) for cls in (VSDMPipeline, BridgePipeline)
    ]
    images = torch.rand(4, 3, 8, 8)
    for pipeline in pipelines:
        of = [
            pipeline.likelihood_bound(images, generator=torch.Generator().manual_seed(0), class_labels=c).total
            for c in (0, 1, None)
        ]
        assert not torch.equal(of[0], of[1]) and not torch.equal(of[0], of[2])
        with pytest.raises(ValueError, match="`class_labels` must lie in 0 to 2"):
            pipeline.likelihood_bound(images, class_labels=9)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_shifted_score_is_shifted(name):
    scheduler = VSDMScheduler.from_power_law(prediction_type=name, clip_sample=False)
    drift = AdaptiveDiagonalDrift((3, 4, 4), basis="dct")
    drift.set_lambda(0.5 + torch.rand(3, 4, 4))
    scheduler.set_drift(drift)
    output, change, x = torch.randn(3, 5, 3, 4, 4).double()
    k = torch.randint(0, 100, (5,))
    shifted = scheduler.get_score(scheduler.shift_score(output, change, k, x), k, x)
    torch.testing.assert_close(shifted, scheduler.get_score(output, k, x) + change, rtol=1e-6, atol=1e-6)


def test_both_networks_are_saved_and_loaded(tmp_path):
    plain = vector_pipeline(solver="heun")
    bridge = BridgePipeline(plain.unet, plain.scheduler, forward_unet=MLPModel(2, 100, 16, 1))
    bridge.save_pretrained(tmp_path)
    for load in (BridgePipeline, DiffusionPipeline):
        again = load.from_pretrained(tmp_path)
        assert isinstance(again, BridgePipeline)
        samples = [p(4, torch.Generator().manual_seed(0), num_inference_steps=5).samples for p in (bridge, again)]
        assert (samples[0] == samples[1]).all()
    forwardless = BridgePipeline.from_pretrained(tmp_path, forward_unet=None)
    assert not (forwardless(4, torch.Generator().manual_seed(0), num_inference_steps=5).samples == samples[0]).all()


def test_a_bridge_between_data_sets_asks_for_one_of_them(tmp_path):
    plain = vector_pipeline()
    BridgePipeline(plain.unet, plain.scheduler, prior="data").save_pretrained(tmp_path)
    bridge = BridgePipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="latents"):
        bridge(4)
    assert bridge(4, latents=data(4), num_inference_steps=3).samples.shape == (4, 2)
    with pytest.raises(ValueError, match="likelihood"):
        bridge.log_likelihood(data(4))
    with pytest.raises(ValueError, match="prior"):
        BridgePipeline(plain.unet, plain.scheduler, prior="moons")


def test_images_go_both_ways():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    networks = [UNet2DModel(4, 3, 3, block_out_channels=(8,), norm_num_groups=4, **blocks) for _ in range(2)]
    bridge = BridgePipeline(networks[0], VSDMScheduler.from_power_law(), forward_unet=networks[1])
    images = bridge(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").samples
    latents, path = bridge.encode(images, 4, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 3, 4, 4) and path.shape == (5, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        bridge.encode(3 * images + 1)
