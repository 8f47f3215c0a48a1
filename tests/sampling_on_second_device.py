"""What users sample, on the device of `second_device`: the results are the CPU's. Run by `test_second_device`."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_vsdm import BridgePipeline, MLPModel, VSDMPipeline
from diffusers_vsdm.solvers import SOLVERS

from .second_device import DeviceTensor, register, second_device
from .test_pipeline import generator, images, samples, vectors
from .test_swap import SD, components, prompts, swapped  # noqa: F401 - a fixture
from .test_swap import pipeline as stable_diffusion


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
register()


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
