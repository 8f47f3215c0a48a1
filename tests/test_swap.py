"""VSDMScheduler in pipelines that others wrote, built of tiny random components of real classes."""

import weakref

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_vsdm import VSDMScheduler
from diffusers_vsdm.solvers import SOLVERS


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
STANDS_FOR = [
    pytest.param(DDPMScheduler(**SD, clip_sample=False), "ddpm", id="DDPM"),
    pytest.param(DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True), "ddim", id="DDIM"),
    pytest.param(DPMSolverMultistepScheduler(**SD), "dpmsolver++", id="DPM-Solver++ 2M"),
    pytest.param(UniPCMultistepScheduler(**SD), "unipc", id="UniPC"),
    # with another spacing it starts from noise of standard deviation s / a, not from a variance-preserving sample
    pytest.param(EulerDiscreteScheduler(**SD, timestep_spacing="leading"), "ddim", id="Euler"),
]


@pytest.fixture(scope="module")
def components():
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=2,
        )
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text.eval()}


def pipeline(components, scheduler, kind=StableDiffusionPipeline):
    nothing = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = kind(**components, **nothing, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(components):
    ids = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        prompt, nothing = (components["text_encoder"](i).last_hidden_state for i in (ids, torch.zeros_like(ids)))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": nothing}


def seed(number=0):
    return torch.Generator().manual_seed(number)


def swapped(stock, solver, **settings):
    """As a user swaps it; the times are made those of the stock scheduler, whose spacings differ in their ends."""
    return VSDMScheduler.from_config(stock.config, solver=solver, clip_sample=False, **settings)


def images(components, scheduler, times, **settings):
    pipe = pipeline(components, scheduler)
    call = {"timesteps": times} if times is not None else {"num_inference_steps": 6}
    out = pipe(**prompts(components), generator=seed(), guidance_scale=5.0, output_type="np", **call, **settings)
    return out.images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("stock, solver", STANDS_FOR)
def test_text_to_image_with_guidance_gives_the_images_of_what_it_stands_for(
    components, stock, solver, prediction_type
):
    stock = type(stock).from_config(stock.config, prediction_type=prediction_type)
    expected = images(components, stock, None)
    times = stock.timesteps.round().long().tolist()
    ours = images(components, swapped(stock, solver), times)
    assert ours.shape == expected.shape == (1, 16, 16, 3)
    assert np.abs(ours - expected).max() < 2e-3


@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("stock, solver", STANDS_FOR)
def test_image_to_image_starts_part_way(components, stock, solver, strength):
    picture = torch.rand(1, 3, 16, 16, generator=seed(5))
    call = {**prompts(components), "image": picture, "strength": strength, "output_type": "np", "guidance_scale": 3.0}
    theirs = pipeline(components, stock, StableDiffusionImg2ImgPipeline)
    expected = theirs(num_inference_steps=10, generator=seed(), **call).images
    stock.set_timesteps(10)
    times = stock.timesteps.round().long().tolist()
    pipe = pipeline(components, swapped(stock, solver), StableDiffusionImg2ImgPipeline)
    ours = pipe(timesteps=times, generator=seed(), **call).images
    assert np.abs(ours - expected).max() < 2e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_with_callbacks_offload_and_half_the_strength(components, solver):
    scheduler = swapped(DDPMScheduler(**SD), solver)
    pipe, seen = pipeline(components, scheduler), []

    def note(pipe, index, timestep, tensors):
        seen.append(index)
        return {"latents": tensors["latents"].clamp(-3, 3)}

    call = {**prompts(components), "num_inference_steps": 4, "output_type": "np"}
    first = pipe(**call, generator=seed(), callback_on_step_end=note).images
    assert seen == list(range(len(scheduler.timesteps))) and np.isfinite(first).all()
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(pipe(**call, generator=seed(), callback_on_step_end=note).images, first)
    pipe.remove_all_hooks()
    edit = pipeline(components, scheduler, StableDiffusionImg2ImgPipeline)
    out = edit(**call, generator=seed(), image=torch.rand(1, 3, 16, 16, generator=seed(5)), strength=0.5).images
    assert np.isfinite(out).all()


def small_unet(channels=3, size=8):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    ).eval()


class FixedTimes:
    """A scheduler whose times are these, in a pipeline that has no argument for them."""

    def __init__(self, scheduler, times):
        self.scheduler, self.times = scheduler, times

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def set_timesteps(self, num_inference_steps):
        self.scheduler.set_timesteps(timesteps=self.times)


@pytest.mark.parametrize("solver", SOLVERS)
def test_latent_pipeline(components, solver):
    """LDMPipeline, unconditional; its step gets no generator, so that only flows can be compared."""
    unet = small_unet(channels=4)
    images = []
    stands_for = {param.values[1]: param.values[0] for param in STANDS_FOR[1:4]}
    ours = swapped(DDIMScheduler(**SD), solver)
    schedulers = [ours]
    if solver in stands_for:
        stock = type(stands_for[solver]).from_config(stands_for[solver].config)
        stock.set_timesteps(6)
        schedulers = [stock, FixedTimes(ours, stock.timesteps.tolist())]
    for scheduler in schedulers:
        pipe = LDMPipeline(vqvae=components["vae"], unet=unet, scheduler=DDIMScheduler())
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(generator=seed(), num_inference_steps=6, output_type="np").images)
    assert images[0].shape == (1, 16, 16, 3) and all(np.isfinite(image).all() for image in images)
    assert np.abs(images[0] - images[-1]).max() < 2e-3


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors held at a time while it was active, beyond those from before."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key)
        return out

    def forget(self, key):
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_takes_the_memory_of_the_stock_pipeline_and_of_the_solver_s_history(solver):
    unet, peaks = small_unet(size=64), []
    for scheduler in (DDPMScheduler(), swapped(DDPMScheduler(), solver)):
        pipe = DDPMPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        call = {"generator": seed(), "num_inference_steps": 6, "output_type": "np"}
        pipe(**call)  # tables and caches are there from now on
        with PeakMemory() as memory:
            pipe(**call)
        peaks.append(memory.peak)
    sample = 3 * 64 * 64 * 4
    assert peaks[0] > 5 * sample  # of a network that was seen to work
    kept = SOLVERS[solver].rule(2).history + (solver in ("unipc", "heun"))  # these hold a sample
    assert peaks[1] <= peaks[0] + kept * sample


@pytest.mark.parametrize("solver", SOLVERS)
def test_ddpm_pipeline_with_every_solver(solver):
    pipe = DDPMPipeline(small_unet(), swapped(DDPMScheduler(), solver))
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(generator=seed(), num_inference_steps=4, output_type="np").images).all()


def test_fitted_moments_serve_a_stock_pipeline_through_its_latents(components):
    scheduler = swapped(DDPMScheduler(**SD), "dpmsolver++")
    latents = 3 * torch.randn(200, 1, 1, 1, generator=seed()) + torch.randn(200, 4, 8, 8, generator=seed())
    scheduler.fit_moments(latents)
    pipe = pipeline(components, scheduler)
    start = scheduler.sample_prior((1, 4, 8, 8), generator=seed(3))
    call = {**prompts(components), "num_inference_steps": 4, "output_type": "np"}
    assert not np.array_equal(pipe(**call, latents=start).images, pipe(**call, generator=seed(3)).images)
