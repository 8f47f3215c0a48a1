"""Training on images: reading them, and the whole way from a folder to samples."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, ScoreSdeVeScheduler
from PIL import Image

from diffusers_vsdm import VSDMPipeline, command_line
from diffusers_vsdm.data.images import DamagedImageError, ImageDataset, load_images
from diffusers_vsdm.models import UNETS, build_model
from diffusers_vsdm.trainer import Trainer, TrainingConfig
from diffusers_vsdm.trainer.report import write_report

from .processes import run_python, run_two


DATA = os.environ.get("VSDM_TEST_DATA")
real_data = pytest.mark.skipif(not DATA, reason="VSDM_TEST_DATA is not set: it names the folder that holds cifar10/")

TINY = {
    "max_train_steps": 12,
    "sa_stages": 2,
    "sa_trajectories": 4,
    "sa_steps": 5,
    "train_batch_size": 4,
    "ddpm_num_steps": 20,
    "learning_rate": 1e-3,
}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def picture(seed, size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for seed in range(9):
        picture(seed).save(tmp_path / "pictures" / f"{seed}.png")
    return tmp_path / "pictures"


def test_pixels_are_scaled_to_the_unit_interval_and_back():
    data = ImageDataset([{"image": picture(0)}], "image")
    assert data.event_shape == (3, 8, 8)
    back = ((data[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(back, np.array(picture(0)))


def test_pictures_of_16_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    data = ImageDataset([{"image": Image.open(tmp_path / "ramp.png")}], "image", 1)
    np.testing.assert_allclose(data[0][0], ramp / 65535 * 2 - 1, atol=0.008)
    with pytest.raises(ValueError, match="Image 0.*mode 'F'"):
        ImageDataset([{"image": Image.new("F", (8, 8))}], "image", 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_mode_get_the_channels_asked_for(mode, channels):
    data = ImageDataset([{"image": picture(0, mode="RGB").convert(mode)}], "image", channels)
    assert data[0].shape == (channels, 8, 8)


def test_arrays_of_any_channels_are_taken_as_they_are():
    rows = [{"x": np.random.default_rng(0).integers(0, 256, (6, 5, 2), dtype=np.uint8)}]
    data = ImageDataset(rows, "x", channels=2)
    assert data.event_shape == (2, 6, 5)
    torch.testing.assert_close(data[0][1], torch.from_numpy(rows[0]["x"][:, :, 1]).float() / 127.5 - 1)
    assert ImageDataset([{"x": rows[0]["x"][:, :, 0]}], "x", channels=1).event_shape == (1, 6, 5)
    with pytest.raises(ValueError, match="whole numbers"):
        ImageDataset(rows, "x", channels=3)
    for wrong in (np.full((6, 5, 2), 0.5), np.full((6, 5, 2), 256), np.full((6, 5, 2), -1)):
        with pytest.raises(ValueError, match="whole numbers from 0 to 255"):
            ImageDataset([{"x": wrong}], "x", channels=2)


@pytest.mark.parametrize("declared", [True, False])
def test_arrays_of_a_parquet_file_are_read(tmp_path, declared):
    arrays = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 2), dtype=np.uint8)
    arrays[0, 0, 0] = 0, 255
    features = datasets.Features({"image": datasets.Array3D((8, 8, 2), "uint8")}) if declared else None
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"image": arrays.tolist()}, features).to_parquet(tmp_path / "data" / "train.parquet")
    data = load_images(str(tmp_path / "data"), channels=2, cache_dir=str(tmp_path / "cache"))
    read = data.__getitems__(list(range(5)))
    assert torch.equal(((read + 1) * 127.5).round().byte(), torch.from_numpy(arrays).permute(0, 3, 1, 2))
    _, result = train_tiny(tmp_path / "data", tmp_path / "out", channels=2, max_train_steps=4, sa_stages=1)
    assert result.pipeline.unet.config["in_channels"] == 2


def test_resizing_keeps_the_aspect_and_the_centre():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (10, 0, 30, 20))  # the middle half
    image = ImageDataset([{"image": wide}], "image", resolution=10)[0]
    assert image.shape == (3, 10, 10)
    assert (image[0, :, 1:-1] == 1).all() and (image[1] == -1).all()  # the resampling blends the outer columns


def test_mixed_sizes_need_a_resolution():
    rows = [{"image": picture(0)}, {"image": picture(1, (8, 10))}]
    data = ImageDataset(rows, "image")
    with pytest.raises(ValueError, match="Image 1 of column .image. is 10 x 8, others are 8 x 8: give a `resolution`"):
        data[1]
    assert ImageDataset(rows, "image", resolution=8).__getitems__([0, 1]).shape == (2, 3, 8, 8)


def test_a_damaged_file_is_named(folder):
    for seed in range(9, 12):  # rows are sorted by name: 10.png is not the tenth
        picture(seed).save(folder / f"{seed}.png")
    file = folder / "10.png"
    file.write_bytes(file.read_bytes()[:60])
    data = load_images(str(folder))
    with pytest.raises(DamagedImageError, match=r"Image 2 of column 'image' \(.*/10.png\) is damaged"):
        data.__getitems__(list(range(12)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_in_mid_training_is_named(folder, tmp_path, monkeypatch, workers):
    def trainer(config):
        made = Trainer(config)
        (folder / "4.png").write_bytes(b"not a picture")
        return made

    settings = TINY | {"train_data_dir": folder, "output_dir": tmp_path / "model", "dataloader_num_workers": workers}
    monkeypatch.setattr("sys.argv", ["train_vsdm.py", *(f"--{name}={value}" for name, value in settings.items())])
    said = r"^train_vsdm.py: Image 4 of column 'image' \(.*/4.png\) is damaged \([^\n]*\): remove it\.$"
    with pytest.raises(SystemExit, match=said):
        command_line.train(TrainingConfig, trainer, lambda trainer, result: {}, None)


@pytest.mark.parametrize("damage", ["cut", "page"])
def test_a_damaged_table_is_told(tmp_path, damage):
    rows = datasets.Dataset.from_dict({"image": [np.full((8, 8), i).tolist() for i in range(200)]})
    file = tmp_path / "train.parquet"
    rows.to_parquet(file)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[20:200] = bytes(180)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="data set.*could not be|could not be read"):
        load_images(str(tmp_path), channels=1, cache_dir=str(tmp_path / "cache"))


def test_captions_beside_the_pictures_are_left_alone(folder):
    for file in list(folder.glob("*.png")):
        file.with_suffix(".txt").write_text("a picture")
    assert len(load_images(str(folder))) == 9


def test_bad_requests(folder, tmp_path):
    with pytest.raises(ValueError, match="`image_column` 'pixels' is not among.*'image'"):
        load_images(str(folder), "pixels")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_images(str(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(ValueError, match="is a file"):
        load_images(str(folder / "0.png"))
    with pytest.raises(ValueError, match="divides"):
        build_model("tiny", (3, 30, 30), 100)
    with pytest.raises(ValueError, match="not for images"):
        build_model("mlp", (3, 32, 32), 100)


def train_tiny(folder, output, **settings):
    config = TrainingConfig(**(TINY | {"train_data_dir": str(folder), "output_dir": str(output)} | settings))
    trainer = Trainer(config)
    return trainer, trainer.train()


@pytest.mark.parametrize(
    "settings, lambda_shape",
    [
        ({"basis": "dct"}, (3, 8, 8)),
        ({"basis": "dct", "lambda_per": "channel", "standardize": True}, (3, 1, 1)),
        ({"lambda_per": "all", "random_flip": True}, (1, 1, 1)),
        ({"channels": 1, "resolution": 4}, (1, 4, 4)),
    ],
)
def test_from_a_folder_to_samples(folder, tmp_path, settings, lambda_shape):
    trainer, result = train_tiny(folder, tmp_path / "model", **settings)
    write_report(trainer.config, result)
    loaded = VSDMPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    drift = loaded.scheduler.drift
    assert loaded.scheduler.config["prediction_type"] == "epsilon"
    assert drift.lam.shape == lambda_shape and drift.config["basis"] == settings.get("basis", "identity")
    assert not drift.is_neutral and drift.data_variance.min() > 0
    images = loaded(2, torch.Generator().manual_seed(0), num_inference_steps=3).images
    size = settings.get("resolution", 8)
    assert images[0].size == (size, size) and images[0].mode == ("L" if "channels" in settings else "RGB")
    again = result.pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=3).images
    assert np.array_equal(np.array(images[1]), np.array(again[1]))
    for name in ("samples.png", "drift.png", "metrics.json", "README.md"):
        assert (tmp_path / "model" / name).stat().st_size > 0


@pytest.mark.parametrize("channels_last", [False, True])  # the order in memory of AdamW's moments
def test_a_resumed_image_run_is_the_uninterrupted_one(folder, tmp_path, channels_last):
    settings = {"basis": "dct", "random_flip": True, "dataloader_num_workers": 1, "channels_last": channels_last}
    whole, _ = train_tiny(folder, tmp_path / "whole", **settings)
    train_tiny(folder, tmp_path / "parts", checkpointing_steps=7, **settings)
    resumed, _ = train_tiny(folder, tmp_path / "parts", resume_from_checkpoint="checkpoint-7", **settings)
    assert torch.equal(whole.losses, resumed.losses)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True)
    )
    assert torch.equal(whole.drift.lam, resumed.drift.lam)


def test_a_checkpoint_of_other_pictures_or_another_network_is_refused(folder, tmp_path):
    settings = {"max_train_steps": 4, "sa_stages": 1, "checkpointing_steps": 2}
    network = json.loads(build_model("tiny", (3, 8, 8), 100).to_json_string())
    (tmp_path / "unet").mkdir()
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(network))
    settings |= {"model_config_name_or_path": str(tmp_path / "unet")}
    train_tiny(folder, tmp_path / "run", **settings)
    settings["resume_from_checkpoint"] = "checkpoint-2"
    train_tiny(folder, tmp_path / "run", **settings)
    config.write_text(json.dumps(network | {"dropout": 0.5}))
    with pytest.raises(ValueError, match="other settings of `network`"):
        train_tiny(folder, tmp_path / "run", **settings)
    config.write_text(json.dumps(network))
    for file in folder.glob("*.png"):
        Image.new("RGB", (8, 8), (int(file.stem) * 20, 0, 0)).save(file)
    with pytest.raises(ValueError, match="other data"):
        train_tiny(folder, tmp_path / "run", **settings)


def test_networks_that_cannot_be_trained_are_refused(folder, tmp_path):
    network = json.loads(build_model("tiny", (3, 8, 8), 100).to_json_string())
    (tmp_path / "unet").mkdir()
    for changed, message in (
        ({"time_embedding_type": "fourier"}, "'fourier'.*0 to 19"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "'learned'.*10.*0 to 19"),
        ({"class_embed_type": "timestep"}, "`class_embed_type` 'timestep'"),
    ):
        (tmp_path / "unet" / "config.json").write_text(json.dumps(network | changed))
        with pytest.raises(ValueError, match=message):
            train_tiny(folder, tmp_path / "run", model_config_name_or_path=str(tmp_path / "unet"))


def test_starts_from_a_pipeline_whose_parts_lie_at_the_root(folder, tmp_path):
    """As those of the first DDPM pipelines on the Hub do."""
    unet = build_model("tiny", (3, 8, 8), 1000)
    unet.save_pretrained(tmp_path / "ddpm")
    DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "ddpm")
    start = {"pretrained_model_name_or_path": str(tmp_path / "ddpm"), "ddpm_num_steps": 100}
    trainer, _ = train_tiny(
        folder, tmp_path / "model", **start, max_train_steps=1, baseline="sgm", learning_rate=1e-30
    )
    assert len(trainer.scheduler) == 50
    torch.testing.assert_close(trainer.network.conv_in.weight, unet.conv_in.weight)


def test_a_start_of_another_kind_of_process_is_refused(folder, tmp_path):
    build_model("tiny", (3, 8, 8), 1000).save_pretrained(tmp_path / "score" / "unet")
    ScoreSdeVeScheduler().save_pretrained(tmp_path / "score" / "scheduler")
    start = {"pretrained_model_name_or_path": str(tmp_path / "score"), "ddpm_num_steps": 100}
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler has no table of betas"):
        train_tiny(folder, tmp_path / "model", **start)


def test_starts_from_a_ddpm_pipeline(folder, tmp_path):
    """Its network, its table of betas and its prediction type; with no training, its samples."""
    unet = build_model("tiny", (3, 8, 8), 1000)
    DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)).save_pretrained(
        tmp_path / "ddpm"
    )
    trainer, result = train_tiny(
        folder,
        tmp_path / "model",
        pretrained_model_name_or_path=str(tmp_path / "ddpm"),
        ddpm_num_steps=100,
        max_train_steps=1,
        learning_rate=1e-30,
        baseline="sgm",
        use_ema=False,
        prior_type="conditional",
        solver="ddpm",
    )
    assert len(trainer.scheduler) == 50 and trainer.scheduler.config["clip_sample"]
    stock = DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50))
    outputs = []
    latents = torch.randn(2, 3, 8, 8)
    for scheduler in (
        DDPMScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing"),
        trainer.scheduler,
    ):
        scheduler.set_timesteps(5)
        x, generator = latents, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            with torch.no_grad():
                x = scheduler.step(result.pipeline.unet(x, t).sample, t, x, generator=generator).prev_sample
        outputs.append(x)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)
    start = {"ddpm_num_steps": 100, "pretrained_model_name_or_path": str(tmp_path / "ddpm")}
    with pytest.raises(ValueError, match="set `channels` and `resolution`"):
        train_tiny(folder, tmp_path / "other", **start, resolution=4)
    with pytest.raises(ValueError, match="leave out `prediction_type`, `beta_max`"):
        train_tiny(folder, tmp_path / "other", **start, prediction_type="edm", beta_max=5.0)
    # and lambda is learned from there
    trainer, learned = train_tiny(folder, tmp_path / "learned", **start)
    assert len(trainer.scheduler) == 50 and not learned.pipeline.scheduler.drift.is_neutral
    write_report(trainer.config, learned)
    card = (tmp_path / "learned" / "README.md").read_text()
    assert "table of betas as in `ddpm`" in card and "power_law" not in card
    result.pipeline.save_pretrained(tmp_path / "vsdm")
    with pytest.raises(ValueError, match="learned drift"):
        train_tiny(folder, tmp_path / "other", **start | {"pretrained_model_name_or_path": str(tmp_path / "vsdm")})


def test_starts_from_a_pipeline_without_a_signal_at_its_last_time(folder, tmp_path):
    """Zero terminal SNR: the process reaches the prior at every lambda, and lambda = 1 goes on as it is."""
    stock = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", num_train_timesteps=50)
    DDPMPipeline(build_model("tiny", (3, 8, 8), 1000), stock).save_pretrained(tmp_path / "ddpm")
    start = {"pretrained_model_name_or_path": str(tmp_path / "ddpm"), "ddpm_num_steps": 100}
    with pytest.raises(ValueError, match="no signal at its last training time.*take `--baseline sgm`"):
        train_tiny(folder, tmp_path / "learned", **start)
    start |= {"baseline": "sgm", "checkpointing_steps": 6}
    with pytest.raises(ValueError, match="'v_prediction' with `solver` 'heun' is undefined: use .* 'ddim'"):
        train_tiny(folder, tmp_path / "undefined", **start, solver="heun")
    start["solver"] = "ddim"
    trainer, result = train_tiny(folder, tmp_path / "model", **start)
    assert torch.isinf(trainer.scheduler.integrated_beta[-1]) and torch.isfinite(trainer.losses).all()
    assert np.isfinite(result.pipeline(2, num_inference_steps=5, output_type="np").images).all()
    resumed, _ = train_tiny(folder, tmp_path / "model", **start, resume_from_checkpoint="checkpoint-6")
    assert torch.equal(resumed.losses, trainer.losses)


def test_images_are_mirrored_in_half_of_the_draws(folder, tmp_path):
    seen = {}
    for flip in (False, True):
        config = TrainingConfig(
            **TINY, random_flip=flip, train_data_dir=str(folder), output_dir=str(tmp_path / str(flip))
        )
        trainer = Trainer(config)
        batch = next(trainer._batches())[1]
        drawn = [trainer._draw(index, batch).sample for index in range(20)]
        seen[flip] = [
            (torch.equal(x, y), torch.equal(x, y.flip(-1))) for d in drawn for x, y in zip(d, batch, strict=True)
        ]
    assert all(plain for plain, _ in seen[False])
    assert all(plain != turned for plain, turned in seen[True])
    assert 20 < sum(turned for _, turned in seen[True]) < 60


def test_takes_any_unet_configuration(folder, tmp_path):
    for name, size in (("square", 8), ("any", None), ("pair", [8, 8])):
        config = {**build_model("tiny", (3, 8, 8), 100).config, "sample_size": size}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        _, result = train_tiny(folder, tmp_path / "model", model_config_name_or_path=str(tmp_path / name))
        assert result.pipeline.unet.config["block_out_channels"] == list(UNETS["tiny"]["block_out_channels"])


def test_a_rectangular_network_that_was_saved_is_taken(tmp_path):
    (tmp_path / "wide").mkdir()
    for seed in range(9):
        picture(seed, (16, 8)).save(tmp_path / "wide" / f"{seed}.png")
    build_model("tiny", (3, 8, 16), 100).save_config(tmp_path / "unet")
    _, result = train_tiny(tmp_path / "wide", tmp_path / "model", model_config_name_or_path=str(tmp_path / "unet"))
    assert result.pipeline(1, num_inference_steps=2).images[0].size == (16, 8)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"out_channels": 6}, "`out_channels` 6"),
        ({"in_channels": 1, "out_channels": 1}, "`in_channels` 1"),
        ({"sample_size": 16}, "`sample_size` 16"),
        ({"sample_size": None, "block_out_channels": [32, 32, 32, 32, 32]}, "16 divides"),
    ],
)
def test_networks_that_do_not_fit_are_refused(folder, tmp_path, changed, message):
    config = {**build_model("tiny", (3, 8, 8), 100).config, **changed}
    for name in ("down_block_types", "up_block_types"):
        block = {"d": "DownBlock2D", "u": "UpBlock2D"}[name[0]]
        config[name] = [block] * len(config["block_out_channels"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        train_tiny(folder, tmp_path / "model", model_config_name_or_path=str(tmp_path / "config.json"))


TWO = """
import sys
import torch
from tests.test_images import train_tiny

torch.set_num_threads(1)
folder, output, batch = sys.argv[1:]
settings = {"basis": "dct", "random_flip": True, "gradient_accumulation_steps": 2, "train_batch_size": int(batch)}
run, result = train_tiny(folder, output, **settings, checkpointing_steps=7)
again, resumed = train_tiny(folder, output, **settings, resume_from_checkpoint="checkpoint-7")
pairs = zip(result.pipeline.unet.parameters(), resumed.pipeline.unet.parameters(), strict=True)
assert all(torch.equal(a, b) for a, b in pairs) and torch.equal(run.drift.lam, again.drift.lam)
if run.accelerator.is_main_process:
    weights = [p.detach().clone() for p in result.pipeline.unet.parameters()]
    torch.save((run.accelerator.num_processes, run.drift.lam, weights), output + ".pt")
"""


def test_two_processes_train_images_as_one_does_and_resume(folder, tmp_path):
    picture(9).save(folder / "9.png")
    picture(10).save(folder / "10.png")
    picture(11).save(folder / "11.png")  # three batches of both
    run_two(TWO, tmp_path, folder, tmp_path / "two", 2)
    outcome = run_python(["-c", TWO, folder, tmp_path / "one", 4])
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    (two, lam, weights), (one, expected_lam, expected) = (torch.load(tmp_path / f"{n}.pt") for n in ("two", "one"))
    assert (two, one) == (2, 1) and lam.std() > 0
    torch.testing.assert_close(lam, expected_lam, rtol=1e-3, atol=1e-3)
    for mine, whole in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=2e-4)


@real_data
def test_reads_cifar10_in_the_layout_of_the_hub():
    data = load_images(str(Path(DATA) / "cifar10"), max_samples=1500, resolution=16)
    batch = data.__getitems__(list(range(1500)))
    assert batch.shape == (1500, 3, 16, 16) and data.column == "img"
    # the brightness of CIFAR-10's training images, known from the literature (0.491, 0.482, 0.447)
    torch.testing.assert_close(
        batch.mean((0, 2, 3)) / 2 + 0.5, torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=0.015
    )
