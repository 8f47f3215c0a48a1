"""Diffusers' own test classes, unmodified, on our classes with a neutral drift; run by `benchmarks.conformance`.

The `tests` package that is imported here is that of a Diffusers checkout.
"""

import unittest

import tests.pipelines.ddpm.test_ddpm as ddpm_pipeline
import tests.pipelines.test_pipelines_common as old
import tests.pipelines.testing_utils.common as new
import tests.schedulers.test_scheduler_ddpm as ddpm_scheduler
import torch
from diffusers import DDPMPipeline, UNet2DModel
from tests.pipelines.pipeline_params import (
    UNCONDITIONAL_IMAGE_GENERATION_BATCH_PARAMS,
    UNCONDITIONAL_IMAGE_GENERATION_PARAMS,
)

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMPipeline, VSDMScheduler


class TestScheduler(ddpm_scheduler.DDPMSchedulerTest):
    """`DDPMSchedulerTest`, and with it `SchedulerCommonTest`."""

    scheduler_classes = (VSDMScheduler,)


class _Swapped:
    """A test class of `DDPMPipeline` with other classes in the place of those that its module imported."""

    swapped: dict = {}

    def setUp(self):
        self.imported = {name: getattr(ddpm_pipeline, name) for name in self.swapped}
        vars(ddpm_pipeline).update(self.swapped)

    def tearDown(self):
        vars(ddpm_pipeline).update(self.imported)


class TestDDPMPipelineWithOurScheduler(_Swapped, ddpm_pipeline.DDPMPipelineFastTests):
    """`DDPMPipelineFastTests` with [`VSDMScheduler`]."""

    swapped = {"DDPMScheduler": VSDMScheduler}


class TestOurPipelineAsDDPMPipeline(_Swapped, ddpm_pipeline.DDPMPipelineFastTests):
    """`DDPMPipelineFastTests` with [`VSDMScheduler`] in [`VSDMPipeline`]."""

    swapped = {"DDPMScheduler": VSDMScheduler, "DDPMPipeline": VSDMPipeline}


def components(ours: bool) -> dict:
    """A small pipeline; for our own class with classes, which guidance needs, and a neutral drift."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4 if ours else None,
    )
    scheduler = VSDMScheduler()
    if ours:
        scheduler.set_drift(AdaptiveDiagonalDrift((3, 8, 8)))
    return {"unet": unet, "scheduler": scheduler}


def inputs(generator: torch.Generator, output_type: str, ours: bool) -> dict:
    """Arguments of a call."""
    arguments = {"batch_size": 1, "generator": generator, "num_inference_steps": 2, "output_type": output_type}
    return arguments | ({"class_labels": 1} if ours else {})


class _Old(old.PipelineTesterMixin):
    params = UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_params = UNCONDITIONAL_IMAGE_GENERATION_BATCH_PARAMS
    required_optional_params = old.PipelineTesterMixin.required_optional_params - {"num_images_per_prompt"}

    def get_dummy_inputs(self, device, seed=0):
        return inputs(torch.Generator(device).manual_seed(seed), "np", self.pipeline_class is VSDMPipeline)


class TestOldMixin(_Old, unittest.TestCase):
    """The old `PipelineTesterMixin` on [`VSDMPipeline`]."""

    pipeline_class = VSDMPipeline

    def get_dummy_components(self):
        """With a neutral drift; the normalizer is left out, as it may be."""
        return components(True) | {"normalizer": None}


class TestOldMixinOnDDPMPipeline(_Old, unittest.TestCase):
    """The old `PipelineTesterMixin` on `DDPMPipeline` with [`VSDMScheduler`]."""

    pipeline_class = DDPMPipeline
    required_optional_params = _Old.required_optional_params - {"latents"}

    def get_dummy_components(self):
        """Without a drift, as a swap leaves it."""
        return components(False)


class TestNewMixin(new.BasePipelineTesterConfig, new.PipelineTesterMixin):
    """The new `PipelineTesterMixin` on [`VSDMPipeline`]."""

    pipeline_class = VSDMPipeline
    required_input_params_in_call_signature = UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_input_params = UNCONDITIONAL_IMAGE_GENERATION_BATCH_PARAMS
    optional_input_params = new.BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    output_shape = (3, 8, 8)

    def get_dummy_components(self):
        """With a neutral drift; the normalizer is left out, as it may be."""
        return components(True) | {"normalizer": None}

    def get_dummy_inputs(self):
        """Torch outputs, as the mixin wants."""
        return inputs(self.get_generator(0), "pt", True)
