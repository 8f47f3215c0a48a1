"""What users do, on the device of `second_device`: the results are those of the CPU. Run by `test_second_device`."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMScheduler

from diffusers_vsdm import BridgePipeline, MLPModel, VSDMPipeline
from diffusers_vsdm.data.images import DecodedImages
from diffusers_vsdm.solvers import SOLVERS
from diffusers_vsdm.trainer import Trainer, TrainingConfig, loop
from diffusers_vsdm.trainer.bridge import BridgeTrainer, train_bridge
from diffusers_vsdm.trainer.bridge_report import write_bridge_report
from diffusers_vsdm.trainer.forecast import ForecastTrainer
from diffusers_vsdm.trainer.report import write_report

from .second_device import DeviceTensor, register, second_device
from .test_bridge_trainer import tiny as tiny_bridge
from .test_forecast_training import tiny as tiny_forecaster
from .test_forecast_training import walks
from .test_images import TINY as TINY_IMAGES
from .test_images import folder  # noqa: F401 - a fixture
from .test_pipeline import generator, images, vectors
from .test_swap import SD, components, prompts, swapped  # noqa: F401 - a fixture
from .test_swap import pipeline as stable_diffusion


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
    "num_likelihood_samples": 20,
}


@contextlib.contextmanager
def training_device():
    """The device, where Accelerate trains too."""
    with pytest.MonkeyPatch.context() as patch, second_device() as device:
        patch.setattr(PartialState, "default_device", property(lambda self: device))
        yield device


def samples(pipeline, drawn=None):
    return pipeline(3, drawn or generator(), num_inference_steps=5, output_type="np").samples


def test_the_device_is_strict():
    with second_device() as device:
        x = torch.ones(2, device=device)
        assert isinstance(x + 1, DeviceTensor) and (x + 1).device == device and not isinstance(x.cpu(), DeviceTensor)
        assert (x * torch.tensor(2.0)).tolist() == [2, 2]  # a number may come from anywhere
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(2)
        with pytest.raises(RuntimeError, match="a generator of cpu draws on second"):
            torch.randn(2, device=device, generator=generator())
        for no_place in (lambda: x.double(), lambda: torch.ones(2).double().to(device), x.numpy):
            with pytest.raises(TypeError):
                no_place()


# sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [vectors, images])
def test_samples_are_those_of_the_cpu(make, solver):
    pipeline = make(solver=solver)
    expected = samples(pipeline)
    with second_device() as device:
        pipeline.to(device)
        assert pipeline.unet.device == device
        np.testing.assert_allclose(samples(pipeline), expected, atol=1e-6)
        np.testing.assert_allclose(samples(pipeline, torch.Generator(device).manual_seed(0)), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_the_drift_stays_exact_in_half_precision_and_offloaded(dtype, offload):
    pipeline = vectors().to(dtype)
    expected, drift = samples(pipeline), pipeline.scheduler.drift
    before = [buffer.clone() for buffer in drift.buffers()]
    with second_device() as device:
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        for _ in range(2):  # the hooks are set anew after a call
            np.testing.assert_allclose(samples(pipeline), expected, rtol=1e-2)
            assert pipeline.unet.device == (torch.device("cpu") if offload else device)
        assert pipeline.unet.dtype == dtype
        assert all(map(torch.equal, drift.buffers(), before)) and drift.lam.dtype == torch.float64


def test_a_saved_pipeline_is_that_of_the_cpu(tmp_path):
    pipeline = vectors()
    expected = samples(pipeline)
    with second_device() as device:
        pipeline.to(device).save_pretrained(tmp_path)
    assert np.array_equal(samples(VSDMPipeline.from_pretrained(tmp_path)), expected)


def test_likelihoods_are_those_of_the_cpu():
    pipeline, x = vectors(), 5 + torch.randn(7, 2)

    def numbers():
        bound = pipeline.likelihood_bound(x, generator=generator()).total
        return torch.stack([pipeline.log_likelihood(x).value, bound])

    expected = numbers()
    with second_device() as device:
        pipeline.to(device)
        torch.testing.assert_close(numbers(), expected, rtol=1e-4, atol=1e-4)


def test_both_ways_of_a_bridge():
    plain = vectors()
    bridge = BridgePipeline(plain.unet, plain.scheduler, plain.normalizer, MLPModel(2, 100, 16, 1))
    bridge.set_progress_bar_config(disable=True)
    x = 5 + torch.randn(7, 2)

    def numbers():
        ends = bridge.encode(x, 10, generator())[0].cpu()
        return samples(bridge), ends.numpy(), bridge.likelihood_bound(x, generator=generator()).total.numpy()

    expected = numbers()
    with second_device() as device:
        bridge.to(device)
        for found, wanted in zip(numbers(), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_swapped_into_stable_diffusion(components, solver):  # noqa: F811
    pipe = stable_diffusion(components, swapped(DDPMScheduler(**SD), solver))
    call = prompts(components) | {"num_inference_steps": 4, "output_type": "np"}
    expected = pipe(**call, generator=generator()).images
    with second_device() as device:
        pipe.enable_model_cpu_offload(device=device)
        np.testing.assert_allclose(pipe(**call, generator=generator()).images, expected, atol=1e-5)
        pipe.remove_all_hooks()


# training ------------------------------------------------------------------------------------------------------------


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
        {"ddpm_beta_schedule": "ve", "num_likelihood_samples": 0},
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
    settings |= {"checkpointing_steps": 6, "eval_batch_size": 2, "ddpm_num_inference_steps": 5}
    assert_same_run(lambda **more: Trainer(TrainingConfig(**TINY_IMAGES | settings | more)), tmp_path)


def test_what_a_run_writes(tmp_path):
    with training_device():
        trainer = Trainer(TrainingConfig(**VECTORS, output_dir=str(tmp_path)))
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
