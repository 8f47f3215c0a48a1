"""VSDMScheduler in pipelines that others wrote, built of tiny random components of real classes."""

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
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
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


@pytest.mark.parametrize("solver", SOLVERS)
def test_ddpm_pipeline_with_every_solver(solver):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    )
    pipe = DDPMPipeline(unet, swapped(DDPMScheduler(), solver))
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
