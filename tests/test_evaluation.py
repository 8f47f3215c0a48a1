"""`training/evaluate.py` without its command line."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from diffusers_vsdm import BridgePipeline, MLPModel, VSDMPipeline, VSDMScheduler
from diffusers_vsdm.trainer.evaluation import EvaluationConfig, evaluate, measure_likelihood


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def model(tmp_path):
    """A stock pipeline, with a stock scheduler."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(4, 3, 3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_images_have_bits_per_dimension(pictures, model):
    config = EvaluationConfig(
        pretrained_model_name_or_path=str(model),
        likelihood=True,
        train_data_dir=str(pictures),
        num_samples=4,
        batch_size=3,
        divergence="rademacher",
        rtol=1e-2,
        atol=1e-2,
    )
    record = evaluate(config)
    assert record["num_samples"] == 4 and record["bound_evaluations"] == 8
    for name in ("nll", "bound"):
        bits = record[f"{name}_bits_per_dimension"]
        assert bits == pytest.approx(record[name] / (48 * math.log(2)), rel=1e-5)
        assert 0 < record[f"{name}_standard_error"] < math.inf
    assert record == evaluate(config)  # one seed, one record


def test_batches_make_one_mean():
    pipeline = VSDMPipeline.from_pretrained("model_cards/spiral-8y")
    samples = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8.0])
    whole, parts = (measure_likelihood(pipeline, samples, n) for n in (0, 20))
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-3)  # the steps are chosen for a batch
    assert parts["nll_standard_error"] == pytest.approx(whole["nll_standard_error"], rel=1e-2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "pretrained_model_name_or_path"),
        ({"pretrained_model_name_or_path": "x"}, "--likelihood"),
        ({"pretrained_model_name_or_path": "x", "likelihood": True}, "dataset_name"),
        ({"pretrained_model_name_or_path": "x", "likelihood": True, "dataset_name": "moons", "rtol": 0.0}, "rtol"),
        (
            {"pretrained_model_name_or_path": "x", "likelihood": True, "dataset_name": "moons", "num_samples": 1},
            "num_samples",
        ),
    ],
)
def test_what_is_missing_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)


def test_a_bridge_is_evaluated_with_both_networks(tmp_path):
    plain = VSDMPipeline.from_pretrained("model_cards/spiral-8y")
    torch.manual_seed(0)
    bridge = BridgePipeline(plain.unet, plain.scheduler, plain.normalizer, forward_unet=MLPModel(2, 100, 16, 1))
    bridge.save_pretrained(tmp_path)
    settings = {"likelihood": True, "dataset_name": "spiral-8y", "num_samples": 8}
    found, without = (
        evaluate(EvaluationConfig(pretrained_model_name_or_path=source, **settings))
        for source in (str(tmp_path), "model_cards/spiral-8y")
    )
    assert abs(found["nll"] - without["nll"]) > 1e-3
    assert (found["bound_evaluations"], without["bound_evaluations"]) == (200, 8)  # of 100 training times


def test_data_that_are_not_the_models(model):
    config = EvaluationConfig(
        pretrained_model_name_or_path=str(model), likelihood=True, dataset_name="moons", num_samples=4
    )
    with pytest.raises(ValueError, match="samples.*shape"):
        evaluate(config)
    pipeline = VSDMPipeline.from_pretrained(model)
    with pytest.raises(ValueError, match="from_config"):
        pipeline.log_likelihood(torch.zeros(1, 3, 4, 4))
    pipeline.scheduler = VSDMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="divergence"):
        pipeline.log_likelihood(torch.zeros(1, 3, 4, 4), divergence="hutchinson")
