"""What users train, on the device of `second_device`: the results are the CPU's. Run by `test_second_device`."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from diffusers_vsdm import VSDMPipeline
from diffusers_vsdm.data.images import DecodedImages
from diffusers_vsdm.trainer import Trainer, TrainingConfig, loop
from diffusers_vsdm.trainer.bridge import BridgeTrainer, train_bridge
from diffusers_vsdm.trainer.bridge_report import write_bridge_report
from diffusers_vsdm.trainer.forecast import ForecastTrainer
from diffusers_vsdm.trainer.report import write_report

from .second_device import register, second_device
from .test_bridge_trainer import tiny as tiny_bridge
from .test_forecast_training import tiny as tiny_forecaster
from .test_forecast_training import walks
from .test_images import TINY as TINY_IMAGES
from .test_images import folder  # noqa: F401 - a fixture
from .test_pipeline import generator, samples, vectors


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
register()

VECTORS = {
    "dataset_name": "moons",
    "standardize": True,
    "max_train_steps": 12,
    "sa_stages": 3,
    "sa_trajectories": 16,
    "num_train_samples": 200,
    "num_eval_samples": 50,
    "train_batch_size": 32,
    "ddpm_num_steps": 20,
    "model_width": 16,
    "model_num_blocks": 1,
    "num_likelihood_samples": 0,  # one run measures likelihoods; they are slow here
}


@contextlib.contextmanager
def training_device():
    """The device, where Accelerate trains too."""
    with pytest.MonkeyPatch.context() as patch, second_device() as device:
        patch.setattr(PartialState, "default_device", property(lambda self: device))
        yield device


def assert_same_run(make, tmp_path):
    """On the device and on the CPU, but for rounding; the result of the latter."""
    results = []
    for name in ("there", "here"):
        AcceleratorState._reset_state(True)
        with contextlib.ExitStack() as stack:
            if name == "there":
                stack.enter_context(training_device())
            trainer = make(output_dir=str(tmp_path / name))
            assert (trainer.accelerator.device.type == "cpu") == (name == "here")
            result = trainer.train()
            results.append((torch.as_tensor(trainer.losses).cpu(), getattr(result, "lambdas", torch.zeros(0))))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "dense", "checkpointing_steps": 5},
        {"sa_update": "ipf", "lambda_varies": True, "zeta": 1.0, "gradient_accumulation_steps": 2},
        {"ddpm_beta_schedule": "ve"},
        {"prior_type": "marginal", "sa_prior": "marginal"},
    ],
)
def test_training_on_vectors(tmp_path, settings):
    assert_same_run(lambda **more: Trainer(TrainingConfig(**VECTORS | settings | more)), tmp_path)


@pytest.mark.parametrize("decoded", [False, True])
def test_training_on_images(tmp_path, folder, decoded, monkeypatch):  # noqa: F811
    if decoded:  # once for all, as on a GPU
        monkeypatch.setattr(loop, "on_device", DecodedImages)
    settings = {"train_data_dir": str(folder), "basis": "dct", "random_flip": True, "validation_steps": 12}
    settings |= {
        "checkpointing_steps": 6,
        "eval_batch_size": 2,
        "ddpm_num_inference_steps": 5,
        "num_likelihood_samples": 0,
    }
    assert_same_run(lambda **more: Trainer(TrainingConfig(**TINY_IMAGES | settings | more)), tmp_path)


def test_what_a_run_writes(tmp_path):
    with training_device():
        trainer = Trainer(TrainingConfig(**VECTORS | {"num_likelihood_samples": 20}, output_dir=str(tmp_path)))
        write_report(trainer.config, trainer.train())
    assert (tmp_path / "samples.png").exists() and (tmp_path / "drift.png").exists()
    assert np.isfinite(samples(VSDMPipeline.from_pretrained(tmp_path))).all()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def trainer(**settings):
        return Trainer(TrainingConfig(**VECTORS | {"output_dir": str(tmp_path), "checkpointing_steps": 7} | settings))

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    with training_device():
        whole = trainer(output_dir=str(tmp_path / "whole"))
        whole.train()
        save = Trainer.save
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "save", interrupted)
            trainer().train()
        resumed = trainer(resume_from_checkpoint="latest")
        assert resumed.step == 7
        resumed.train()
        assert torch.equal(resumed.losses.cpu(), whole.losses.cpu())
        assert torch.equal(resumed.drift.lam, whole.drift.lam)


@pytest.mark.parametrize("objective", ["matching", "alternating", "joint"])
def test_training_of_bridges(tmp_path, objective):
    start = vectors(num_train_timesteps=100)
    settings = {"objective": objective, "bridge_stages": 1, "bridge_num_steps": 10, "ddpm_num_steps": 100}

    def make(**more):
        return BridgeTrainer(tiny_bridge(**settings | more), copy.deepcopy(start))

    assert_same_run(make, tmp_path)


def test_the_start_of_a_bridge_and_its_report(tmp_path):
    with training_device():
        result = train_bridge(tiny_bridge(num_eval_samples=30, output_dir=str(tmp_path)))
        assert np.isfinite(write_bridge_report(result)["metrics"]["w2_sde"])


def test_training_of_forecasters(tmp_path):
    # recurrent ones have kernels of their own on devices, which there is none of here
    def make(**more):
        return ForecastTrainer(tiny_forecaster(encoder_type="transformer", **more), walks())

    pipeline, history = assert_same_run(make, tmp_path).pipeline, walks().iloc[:-4]
    expected = pipeline(history, 4, num_inference_steps=5, generator=generator()).samples
    with second_device() as device:
        found = pipeline.to(device)(history, 4, num_inference_steps=5, generator=generator()).samples
    np.testing.assert_allclose(found, expected, rtol=1e-5)
