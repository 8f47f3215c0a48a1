"""Training on both sides."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vsdm import BridgePipeline
from diffusers_vsdm.models import build_model
from diffusers_vsdm.trainer import bridge
from diffusers_vsdm.trainer.bridge import BridgeConfig, BridgeTrainer, train_bridge
from diffusers_vsdm.trainer.checkpoint import list_checkpoints
from diffusers_vsdm.trainer.loop import train

from .processes import run_two


def tiny(**settings):
    given = {"dataset_name": "moons", "standardize": True, "beta_max": 3.0, "prior_type": "conditional"}
    given |= {"max_train_steps": 40, "train_batch_size": 64, "num_train_samples": 2000, "num_eval_samples": 0}
    given |= {"model_width": 16, "model_num_blocks": 1, "ddpm_num_steps": 20, "lr_warmup_steps": 5}
    given |= {"bridge_stages": 2, "bridge_steps": 6, "bridge_paths": 64, "bridge_refresh": 3}
    return BridgeConfig(**given | settings)


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    return train(tiny()).pipeline


def weights(pipeline):
    networks = {"backward": pipeline.unet, "forward": pipeline.forward_unet}
    return {f"{side}.{name}": t for side, network in networks.items() for name, t in network.state_dict().items()}


@pytest.mark.parametrize("objective", ["matching", "alternating"])
def test_the_forward_network_finds_the_way_to_the_prior(objective):
    """Of a wide Gaussian in a short time: the reference ends at variance 2.6 of 0.69, the trained process near it."""
    config = tiny(
        dataset_name="gaussian-centered", standardize=False, max_train_steps=400, train_batch_size=256, model_width=32
    )
    bridge_settings = {"bridge_stages": 3, "bridge_steps": 500, "bridge_paths": 512, "bridge_refresh": 50}
    config = dataclasses.replace(
        config, objective=objective, bridge_learning_rate=2e-3, ddpm_num_steps=50, **bridge_settings
    )
    torch.manual_seed(0)
    result = train_bridge(config)
    prior = float(result.pipeline.scheduler.prior().std.flatten()[0]) ** 2
    x = bridge.sample_toy("gaussian-centered", 4000, torch.Generator().manual_seed(1))
    before, after = (
        BridgePipeline(p.unet, p.scheduler, forward_unet=getattr(p, "forward_unet", None))
        .encode(x, generator=torch.Generator().manual_seed(2))[0]
        .var(0)
        for p in (result.start, result.pipeline)
    )
    assert before[1] / prior > 2.5
    assert abs(float(after[1]) / prior - 1) < 0.25 and abs(float(after[0]) / prior - 1) < 0.25


@pytest.mark.parametrize("objective", bridge.OBJECTIVES)
def test_a_run_trains_what_it_says(start, objective):
    before = {name: t.clone() for name, t in start.unet.state_dict().items()}
    energy = 0.1 if objective == "joint" else 0.0
    result = train_bridge(tiny(objective=objective, control_energy=energy, bridge_stages=1, bridge_num_steps=5), start)
    assert all(torch.equal(t, before[name]) for name, t in start.unet.state_dict().items())  # the start stays
    assert any(not torch.equal(t, before[name]) for name, t in result.pipeline.unet.state_dict().items())
    assert any(t.abs().sum() > 0 for t in result.pipeline.forward_unet.readout.state_dict().values())
    assert len(result.losses) == 2 and torch.tensor(result.losses).isfinite().all()
    samples = result.pipeline(4, torch.Generator().manual_seed(0), num_inference_steps=5).samples
    assert samples.shape == (4, 2)


@pytest.mark.parametrize("objective, times", [("matching", 2), ("alternating", 4)])
def test_paths_that_would_be_learned_by_heart_are_drawn_anew_more_often(start, monkeypatch, objective, times):
    drawn, simulate = [], BridgeTrainer._simulate

    def counted(self, direction):
        drawn.append(direction)
        return simulate(self, direction)

    monkeypatch.setattr(BridgeTrainer, "_simulate", counted)
    train_bridge(tiny(objective=objective, bridge_stages=1, bridge_steps=50, bridge_refresh=0), start)
    assert len(drawn) == times


def test_joint_training_bounds_the_entropy_of_the_data():
    """No pair of networks is below it, however few the steps of a path: an integral of Eq. 24 over them would be."""
    settings = {"dataset_name": "gaussian-centered", "standardize": False, "train_batch_size": 512}
    settings |= {"objective": "joint", "bridge_stages": 1, "bridge_steps": 100, "bridge_num_steps": 5}
    result = train_bridge(tiny(**settings, bridge_learning_rate=5e-3))
    covariance = bridge.sample_toy("gaussian-centered", 100_000, torch.Generator().manual_seed(0)).T.cov()
    entropy = 0.5 * float(torch.logdet(2 * torch.pi * torch.e * covariance.double()))
    assert entropy - 0.05 < min(result.losses) and result.losses[-1] < entropy + 1


def test_a_weight_on_the_control_energy_lowers_it_while_it_lasts(start, monkeypatch):
    settings = {"objective": "joint", "bridge_stages": 1, "bridge_steps": 30, "bridge_num_steps": 5}
    settings |= {"bridge_learning_rate": 2e-3}
    energies = []
    for weight, fall in ((0.0, bridge.ENERGY_FALL), (100.0, bridge.ENERGY_FALL), (100.0, 1.0)):
        monkeypatch.setattr(bridge, "ENERGY_FALL", fall)
        process = train_bridge(tiny(**settings, control_energy=weight), start).pipeline.process()
        x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            _, controls = process.run(x, 1, torch.Generator().manual_seed(0))
        energies.append(float(torch.diff(process.g) @ controls.double().square().sum(2).mean(1)))
    without, falling, staying = energies
    assert staying < 0.1 * falling and falling < 0.2 * without


def test_a_bridge_starts_as_its_reference(start):
    trainer = BridgeTrainer(tiny(), start)
    x = torch.randn(5, 2)
    assert (trainer.process.forward(x, torch.zeros(5)) == 0).all()
    torch.testing.assert_close(
        trainer.process.backward(x, torch.full((5,), 3)),
        start.scheduler.get_score(start.unet(x, 3).sample, 3, x),
    )


def test_an_interrupted_run_is_the_whole_one(start, tmp_path):
    whole = train_bridge(tiny(output_dir=str(tmp_path / "whole"), checkpointing_steps=1), start)
    config = tiny(output_dir=str(tmp_path / "parts"), checkpointing_steps=1)
    first = BridgeTrainer(
        config, bridge.VSDMPipeline(bridge.copy.deepcopy(start.unet), start.scheduler, start.normalizer)
    )
    calls, half_bridge = [], first._half_bridge

    def stops(direction):
        calls.append(direction)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return half_bridge(direction)

    first._half_bridge = stops
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert calls == [1, -1, 1]
    again = train_bridge(dataclasses.replace(config, resume_from_checkpoint="latest"), start)
    expected = weights(whole.pipeline)
    assert all(torch.equal(t, expected[name]) for name, t in weights(again.pipeline).items())
    assert again.losses == whole.losses
    with pytest.raises(ValueError, match="bridge_stages"):
        train_bridge(dataclasses.replace(config, resume_from_checkpoint="latest", bridge_stages=3), start)


def test_paths_that_blow_up_keep_the_last_checkpoint(start, tmp_path):
    config = tiny(output_dir=str(tmp_path), checkpointing_steps=1)
    trainer = BridgeTrainer(config, bridge.VSDMPipeline(bridge.copy.deepcopy(start.unet), start.scheduler))
    half_bridge = trainer._half_bridge

    def spoils(direction):
        if trainer.half == 1:
            with torch.no_grad():
                for shadow in trainer.sides[bridge.FORWARD].ema.shadow_params:
                    shadow.fill_(torch.inf)
        return half_bridge(direction)

    trainer._half_bridge = spoils
    with pytest.raises(FloatingPointError, match="Stage 1, backward.*forward paths.*training time.*checkpoint-1"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "bridge")] == ["checkpoint-1"]


def test_paths_that_blow_up_and_stay_finite_are_told_and_a_lower_rate_goes_on(start, tmp_path):
    config = tiny(output_dir=str(tmp_path), checkpointing_steps=1, bridge_stages=1)

    def trainer(**settings):
        own = bridge.VSDMPipeline(bridge.copy.deepcopy(start.unet), start.scheduler)
        return BridgeTrainer(dataclasses.replace(config, **settings), own)

    spoilt = trainer()
    half_bridge = spoilt._half_bridge

    def spoils(direction):
        if spoilt.half == 1:
            with torch.no_grad():
                spoilt.sides[bridge.FORWARD].ema.shadow_params[-1].fill_(1e4)
        return half_bridge(direction)

    spoilt._half_bridge = spoils
    with pytest.raises(FloatingPointError, match="Stage 1, backward.*as far as.*checkpoint-1"):
        spoilt.train()
    resumed = trainer(resume_from_checkpoint="latest", bridge_learning_rate=1e-4)
    assert resumed.half == 1
    resumed.train()
    assert len(resumed.losses) == 2


def _one_of_two(folder):
    """A run of each objective, then one whose paths are not finite in the second process alone."""
    torch.set_num_threads(1)
    share, steps = BridgeTrainer._share_gradients, []

    def recorded(trainer, sides):
        parameters = [p for side in sides for p in side.network.parameters()]
        before = torch.cat([p.grad.flatten() for p in parameters])
        share(trainer, sides)
        steps.append(torch.stack([before, torch.cat([p.grad.flatten() for p in parameters])]))

    BridgeTrainer._share_gradients = recorded
    trained = {}
    for objective in bridge.OBJECTIVES:
        settings = {"objective": objective, "output_dir": str(folder / objective), "checkpointing_steps": 1}
        config = tiny(
            bridge_stages=1, bridge_steps=2, bridge_refresh=2, max_train_steps=5, bridge_num_steps=5, **settings
        )
        trained[objective] = weights(train_bridge(config).pipeline), steps.copy()
        steps.clear()
    index = bridge.process_state().process_index
    torch.save(trained, folder / f"{index}.pt")
    if index:
        bridge.TwoSidedProcess.control = lambda self, x, k, direction: torch.full_like(x, torch.inf)
    with pytest.raises(FloatingPointError, match="forward paths|backward paths|another process"):
        train_bridge(config)


def test_two_processes_share_their_gradients(tmp_path):
    """By torchrun, after which, unlike after a fork, Accelerate may end the group of processes."""
    call = f"test_bridge_trainer._one_of_two(Path({str(tmp_path)!r}))"
    run_two(f"from pathlib import Path\nfrom tests import test_bridge_trainer\n{call}\n", tmp_path)
    first, second = (torch.load(tmp_path / f"{index}.pt") for index in range(2))
    for objective, (expected, steps) in first.items():
        other, other_steps = second[objective]
        assert len(steps) == 4 and all(torch.equal(t, other[name]) for name, t in expected.items())
        for (mine, shared), (theirs, also_shared) in zip(steps, other_steps, strict=True):
            assert not torch.allclose(mine, theirs)  # of different paths
            torch.testing.assert_close(shared, (mine + theirs) / 2)
            assert torch.equal(shared, also_shared)
        assert [path.name for path in list_checkpoints(tmp_path / objective / "bridge")] == [
            "checkpoint-1",
            "checkpoint-2",
        ]


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "data").mkdir()
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{seed}.png")
    settings = {"train_data_dir": str(tmp_path / "data"), "dataset_name": "", "standardize": False}
    settings |= {"train_batch_size": 4, "bridge_stages": 1, "bridge_steps": 2, "bridge_paths": 4}
    return settings | {"max_train_steps": 2, "bridge_num_steps": 3}


@pytest.mark.parametrize("objective", bridge.OBJECTIVES)
def test_images_with_attention(pictures, objective):
    """`alternating` differentiates the divergence of a network with attention, along random directions."""
    result = train_bridge(tiny(**pictures, objective=objective))
    images = result.pipeline(2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_images_are_mirrored(pictures):
    one, other = (
        BridgeTrainer(tiny(**pictures, random_flip=flip), train(tiny(**pictures)).pipeline) for flip in (0, 1)
    )
    for trainer in (one, other):
        trainer.generator.manual_seed(0)
    plain, mirrored = one._ends(bridge.FORWARD, 32), other._ends(bridge.FORWARD, 32)
    known = [(x == y).all() or (x.flip(-1) == y).all() for x, y in zip(plain, mirrored, strict=True)]
    assert all(known) and 8 < sum(not torch.equal(x, y) for x, y in zip(plain, mirrored, strict=True)) < 24


def test_channels_last_holds_for_both_networks(pictures, tmp_path):
    """Also for a start that comes from a folder, where the order of memory is not kept."""
    config, folder = tiny(**pictures, channels_last=True, output_dir=str(tmp_path / "run")), tmp_path / "start"
    for resume in ("", "latest"):
        again = dataclasses.replace(config, resume_from_checkpoint=resume)
        pipeline = train_bridge(again, start_folder=folder).pipeline
        for network in (pipeline.unet, pipeline.forward_unet):
            weight = network.mid_block.resnets[0].conv1.weight
            assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_dropout_resumes_to_the_bit(pictures, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(dict(build_model("tiny", (3, 16, 16), 20).config) | {"dropout": 0.5})
    )
    settings = pictures | {"model_config_name_or_path": str(tmp_path / "config.json"), "checkpointing_steps": 1}
    config = tiny(**settings, output_dir=str(tmp_path / "run"))
    folder = tmp_path / "run" / "start"
    whole = weights(train_bridge(config, start_folder=folder).pipeline)
    shutil.rmtree(tmp_path / "run" / "bridge" / "checkpoint-2")
    torch.rand(3)  # as another process would stand elsewhere
    again = train_bridge(dataclasses.replace(config, resume_from_checkpoint="latest"), start_folder=folder)
    assert all(torch.equal(t, whole[name]) for name, t in weights(again.pipeline).items()) and again.start_seconds > 0


def test_a_start_of_other_settings_is_refused(tmp_path):
    config = tiny(output_dir=str(tmp_path), bridge_stages=1, checkpointing_steps=1)
    train_bridge(config, start_folder=tmp_path / "start")
    shutil.rmtree(tmp_path / "bridge")
    with pytest.raises(ValueError, match="beta_max"):
        changed = dataclasses.replace(config, resume_from_checkpoint="latest", beta_max=4.0)
        train_bridge(changed, start_folder=tmp_path / "start")
    # what a fresh run finds is not its own
    (tmp_path / "bridge" / "checkpoint-2").mkdir(parents=True)
    train_bridge(config, start_folder=tmp_path / "start")
    assert (tmp_path / "bridge" / "checkpoint-2" / "state.json").exists()


@pytest.mark.parametrize("objective", bridge.OBJECTIVES)
def test_a_gradient_that_is_not_finite_ends_the_run(start, objective, tmp_path, monkeypatch):
    share, calls = BridgeTrainer._share_gradients, []

    def spoils(trainer, sides):
        share(trainer, sides)
        calls.append(sides)
        if len(calls) == 12:  # the last of the second half bridge
            next(sides[0].network.parameters()).grad.fill_(torch.nan)

    monkeypatch.setattr(BridgeTrainer, "_share_gradients", spoils)
    with pytest.raises(FloatingPointError, match="Stage 1.*norm is nan"):
        train_bridge(
            tiny(objective=objective, output_dir=str(tmp_path), checkpointing_steps=1, bridge_num_steps=5), start
        )
    assert [path.name for path in list_checkpoints(tmp_path / "bridge")] == ["checkpoint-1"]


def test_losses_are_logged(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"logger": "tensorboard", "logging_steps": 4, "bridge_stages": 1}
    train_bridge(tiny(output_dir=str(tmp_path), **settings), start)
    events = EventAccumulator(str(tmp_path / "logs" / "sb-fbsde"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12]


def test_between_two_data_sets():
    settings = {"standardize": False, "ddpm_beta_schedule": "brownian", "sigma_max": 1.0}
    result = train_bridge(tiny(prior_dataset_name="8gaussians", prediction_type="epsilon", **settings))
    with pytest.raises(ValueError, match="latents"):
        result.pipeline(4)
    latents, _ = result.pipeline.encode(torch.randn(4, 2))
    assert result.pipeline(4, latents=latents, num_inference_steps=5).samples.shape == (4, 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bridge_stages": 0}, "bridge_stages"),
        ({"control_energy": -1.0}, "control_energy"),
        ({"control_energy": 1.0}, "control_energy"),
        ({"bridge_ema_decay": 2.0}, "bridge_ema_decay"),
        ({"bridge_num_steps": -1}, "bridge_num_steps"),
        ({"bridge_num_steps": 200}, "bridge_num_steps.*training times"),
        ({"bridge_corrector_steps": -1}, "bridge_corrector_steps"),
        ({"bridge_corrector_steps": 1, "objective": "matching"}, "bridge_corrector_steps"),
        ({"bridge_corrector_steps": 1, "objective": "joint"}, "bridge_corrector_steps"),
        ({"prior_dataset_name": "cifar10"}, "prior_dataset_name"),
        ({"prior_dataset_name": "moons"}, "standardize"),
        ({"prior_dataset_name": "moons", "standardize": False, "objective": "joint"}, "density"),
        ({"lambda_varies": True, "zeta": 1.0}, "lambda_varies"),
        ({"objective": "both"}, "objective"),
        ({"ddpm_beta_schedule": "brownian", "sigma_max": 0.0}, "sigma_max"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
