"""Every way of loading a saved model gives the same samples, to the bit, in a process that knows nothing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_vsdm import VSDMPipeline, VSDMScheduler
from diffusers_vsdm.hub.remote_code import FILE_NAME, write_remote_code

from .processes import run_python
from .test_pipeline import generator, images, vectors


SAMPLE = """
pipeline.set_progress_bar_config(disable=True)
import numpy, torch
samples = pipeline(7, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").samples
numpy.save("samples.npy", samples)
"""
NOTHING_KNOWN = "import sys\nassert not {'diffusers', 'diffusers_vsdm', 'huggingface_hub'} & sys.modules.keys()\n"
WAYS = {
    "VSDMPipeline": "from diffusers_vsdm import VSDMPipeline\npipeline = VSDMPipeline.from_pretrained('model')",
    "DiffusionPipeline": (
        "import diffusers_vsdm\nfrom diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained('model')"
    ),
    "custom_pipeline": (
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained('model', custom_pipeline='model', trust_remote_code=True)"
    ),
    "scheduler by itself": (
        "from diffusers_vsdm import VSDMPipeline, VSDMScheduler\n"
        "scheduler = VSDMScheduler.from_pretrained('model', subfolder='scheduler')\n"
        "pipeline = VSDMPipeline.from_pretrained('model', scheduler=scheduler)"
    ),
}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    pipeline = vectors()
    pipeline.save_pretrained(folder / "model")
    write_remote_code(folder / "model")
    return folder, pipeline(7, generator(), num_inference_steps=5, output_type="np").samples


@pytest.mark.parametrize("way", WAYS)
def test_fresh_processes_sample_the_same_bits(saved, way):
    folder, expected = saved
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    run_python(["-c", NOTHING_KNOWN + WAYS[way] + SAMPLE], folder, environment).check_returncode()
    assert np.array_equal(np.load(folder / "samples.npy"), expected)
    (folder / "samples.npy").unlink()


def test_the_remote_file_is_the_generated_one(tmp_path):
    write_remote_code(tmp_path)
    assert (Path(__file__).parents[1] / "pipelines" / FILE_NAME).read_text() == (tmp_path / FILE_NAME).read_text()


@pytest.mark.parametrize("make", [vectors, images])
def test_variant(tmp_path, make):
    pipeline = make().to(torch.float16)
    expected = pipeline(2, generator(), num_inference_steps=3, output_type="np").samples
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = quiet(VSDMPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16))
    assert np.array_equal(loaded(2, generator(), num_inference_steps=3, output_type="np").samples, expected)
    if pipeline.scheduler.drift is not None:
        assert torch.equal(loaded.scheduler.drift.lam, pipeline.scheduler.drift.lam)


def test_saving_again_keeps_the_plain_index(tmp_path):
    vectors().save_pretrained(tmp_path / "a")
    write_remote_code(tmp_path / "a")
    first = (tmp_path / "a" / "model_index.json").read_text()
    DiffusionPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = (tmp_path / "b" / "model_index.json").read_text()
    assert first == again.replace(f'\n  "_name_or_path": "{tmp_path / "a"}",', "")


def test_swapped_components_keep_the_drift(tmp_path):
    """What people do with pipelines: another scheduler, the same components in another pipeline."""
    pipeline = vectors()
    lam = pipeline.scheduler.drift.lam
    pipeline.scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver="ddim")
    assert torch.equal(pipeline.scheduler.drift.lam, lam)
    other = VSDMPipeline(**pipeline.components)
    assert torch.equal(other.scheduler.drift.lam, lam)
    other.save_pretrained(tmp_path)
    assert torch.equal(VSDMPipeline.from_pretrained(tmp_path).scheduler.drift.lam, lam)
