"""Networks that know classes: what they are called with, guidance, and training them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMPipeline, VSDMScheduler
from diffusers_vsdm.data.images import load_images
from diffusers_vsdm.models import build_model
from diffusers_vsdm.models.classes import num_classes
from diffusers_vsdm.trainer import Trainer, TrainingConfig
from diffusers_vsdm.trainer.pictures import picture_samples
from diffusers_vsdm.trainer.report import write_report

from .test_pipeline import generator, images, randomize


CLASSES = 3
TINY = {
    "class_conditional": True,
    "max_train_steps": 8,
    "sa_stages": 2,
    "sa_trajectories": 4,
    "sa_steps": 3,
    "train_batch_size": 4,
    "ddpm_num_steps": 20,
    "lr_warmup_steps": 0,
    "eval_batch_size": 4,
    "ddpm_num_inference_steps": 2,
}


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Recorder(UNet2DModel):
    """Predicts its class's number, and remembers its calls."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls = [*getattr(self, "calls", []), (len(sample), class_labels.tolist())]
        return (sample * 0.1 + class_labels.reshape(-1, 1, 1, 1).to(sample),)


def small_unet(cls=UNet2DModel, classes=CLASSES):
    network = randomize(
        cls(
            sample_size=4,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            num_class_embeds=classes + 1,
        )
    )
    network.class_embedding.weight.data *= 30  # so that classes matter
    network.conv_out.weight.data *= 10
    return network


def conditional(cls=UNet2DModel, **settings):
    scheduler = VSDMScheduler(clip_sample=False, **({"solver": "ddim"} | settings))
    drift = AdaptiveDiagonalDrift((3, 4, 4))
    drift.set_lambda(torch.rand(3, 4, 4, dtype=torch.float64) + 0.5)
    scheduler.set_drift(drift)
    pipeline = VSDMPipeline(small_unet(cls), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver, prediction_type, scale",
    [
        ("ddim", "epsilon", 1.7),
        ("ddim", "epsilon", 0.0),
        ("heun", "v_prediction", 4.0),
        ("dpmsolver++", "sample", -1.0),
    ],
)
def test_guidance_is_the_combination_by_hand(solver, prediction_type, scale):
    pipeline = conditional(solver=solver, prediction_type=prediction_type)
    labels = torch.tensor([0, 2])
    arguments = {"num_inference_steps": 5, "output_type": "latent", "class_labels": labels}
    actual = pipeline(2, generator(), **arguments, guidance_scale=scale).samples
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    x = scheduler.sample_prior((2, 3, 4, 4), generator())
    with torch.no_grad():
        for k in scheduler.timesteps:
            model_input = scheduler.scale_model_input(x, k)
            null = pipeline.unet(model_input, k, torch.tensor([CLASSES] * 2)).sample
            of_class = pipeline.unet(model_input, k, labels).sample
            x = scheduler.step(null + scale * (of_class - null), k, x).prev_sample
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)
    assert (actual - pipeline(2, generator(), **arguments).samples).abs().max() > 0.01


def test_a_callback_may_change_the_guidance():
    """As in Diffusers, by `_guidance_scale`: from the next step on."""
    pipeline, arguments = conditional(), {"num_inference_steps": 2, "output_type": "latent", "class_labels": 1}
    paths = {}
    for scale in (1.0, 3.0):
        start = torch.Generator().manual_seed(0)
        _, paths[scale] = pipeline(
            2, start, guidance_scale=scale, **arguments, return_trajectory=True, return_dict=False
        )

    def rise(pipe, index, timestep, tensors):
        pipe._guidance_scale = 3.0
        return tensors

    (changed,) = pipeline(
        2, torch.Generator().manual_seed(0), callback_on_step_end=rise, **arguments, return_dict=False
    )
    assert pipeline.guidance_scale == 3.0 and pipeline.do_classifier_free_guidance
    (expected,) = pipeline(
        2,
        latents=paths[1.0][1],
        timesteps=[0],
        guidance_scale=3.0,
        output_type="latent",
        class_labels=1,
        return_dict=False,
    )
    assert not torch.equal(changed, paths[1.0][-1]) and not torch.equal(changed, paths[3.0][-1])
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize(
    "given, seen",
    [
        ({}, (2, [CLASSES] * 2)),
        ({"class_labels": 1}, (2, [1, 1])),
        ({"class_labels": [2, 0]}, (2, [2, 0])),
        ({"class_labels": torch.tensor([0, 1], dtype=torch.uint8), "guidance_scale": 1}, (2, [0, 1])),
        ({"class_labels": np.array([0, 1]), "guidance_scale": 3.0}, (4, [CLASSES, CLASSES, 0, 1])),
    ],
)
def test_one_call_in_each_step_and_of_twice_the_size_only_with_guidance(given, seen):
    pipeline = conditional(Recorder)
    pipeline(2, num_inference_steps=4, **given)
    assert pipeline.unet.calls == [seen] * 4


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"class_labels": [0]}, ValueError, "each of the 2 samples, got shape"),
        ({"class_labels": [[0, 1]]}, ValueError, "got shape"),
        ({"class_labels": [0, CLASSES]}, ValueError, "0 to 2, got"),
        ({"class_labels": -1}, ValueError, "0 to 2, got -1"),
        ({"class_labels": [0.0, 1.0]}, TypeError, "whole numbers"),
        ({"class_labels": ["cat", "dog"]}, TypeError, "whole numbers"),
        ({"guidance_scale": 2.0}, ValueError, "`guidance_scale` 2.0 guides towards classes"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, ValueError, "`guidance_scale` must be finite"),
    ],
)
def test_bad_requests_of_classes_are_named(given, error, message):
    with pytest.raises(error, match=message):
        conditional()(2, num_inference_steps=1, **given)


def test_a_network_without_classes_takes_none():
    pipeline = images()
    assert pipeline.num_classes is None
    with pytest.raises(ValueError, match="`class_labels` are given, but the network knows of no classes"):
        pipeline(1, num_inference_steps=1, class_labels=0)
    with pytest.raises(ValueError, match="guidance_scale"):
        pipeline(1, num_inference_steps=1, guidance_scale=2.0)


@pytest.mark.parametrize("loader", [VSDMPipeline, DiffusionPipeline])
def test_samples_of_classes_are_bit_identical_after_loading(tmp_path, loader):
    pipeline = conditional(solver="heun")
    arguments = {"num_inference_steps": 4, "output_type": "pt", "class_labels": [0, 1, 2], "guidance_scale": 2.5}
    before = pipeline(3, generator(), **arguments).samples
    pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.num_classes == CLASSES
    assert torch.equal(loaded(3, generator(), **arguments).samples, before)
    # classes and guidance matter
    assert not torch.equal(pipeline(3, generator(), **(arguments | {"guidance_scale": 1.0})).samples, before)
    assert not torch.equal(pipeline(3, generator(), **(arguments | {"class_labels": [0, 1, 0]})).samples[2], before[2])


def test_likelihoods_are_of_all_data_or_of_a_class():
    """Those of a class are of a network that knows this class alone."""
    pipeline = conditional()
    samples = torch.rand(2, 3, 4, 4)
    for given, label in (({}, CLASSES), ({"class_labels": 1}, 1), ({"class_labels": [1, 1]}, 1)):
        alone = VSDMPipeline(small_unet(), pipeline.scheduler)
        state = pipeline.unet.state_dict()
        state["class_embedding.weight"] = state["class_embedding.weight"][label].expand(CLASSES + 1, -1)
        alone.unet.load_state_dict(state)
        actual, expected = (
            (
                pipe.log_likelihood(samples, "rademacher", generator(), 1e-3, 1e-3, **arguments).value,
                pipe.likelihood_bound(samples, 2, generator(), **arguments).total,
            )
            for pipe, arguments in ((pipeline, given), (alone, {}))
        )
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="each of the 2 samples"):
        pipeline.likelihood_bound(samples, class_labels=[0, 1, 2])


def test_pictures_show_the_classes_in_turn():
    pipeline = conditional(Recorder)
    picture_samples(pipeline, 5, 1)
    assert pipeline.unet.calls == [(5, [0, 1, 2, 0, 1])]


# Training ---------------------------------------------------------------------------------------------------------


def data_set(labels, feature=None):
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(x) for x in pixels], "label": labels}
    return Dataset.from_dict(columns, Features({"image": ImageFeature(), "label": feature or Value("int64")}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled")
    data_set([0, 1, 2, 1, 0, 2, 1, 0, 0, 1], ClassLabel(names=["a", "b", "c", "d"])).to_parquet(path / "train.parquet")
    return path


def trainer(folder, output, **settings):
    return Trainer(TrainingConfig(**(TINY | {"train_data_dir": str(folder), "output_dir": str(output)} | settings)))


def test_labels_come_from_the_column(folder, tmp_path):
    data = load_images(str(folder), label_column="label", max_samples=4)
    assert data.labels.tolist() == [0, 1, 2, 1] and data.num_classes == 4  # as declared
    data_set([0, 5, 2]).to_parquet(tmp_path / "train.parquet")
    assert load_images(str(tmp_path), label_column="label").num_classes == 6


@pytest.mark.parametrize(
    "labels, column, feature, message",
    [
        ([0, 1, -1], "label", None, "holds -1 in row 2"),
        ([0.0, 0.5, 1.0], "label", Value("float32"), "whole number for each image, got 0.0 in row 0"),
        (["a", "b", "c"], "label", Value("string"), "whole number for each image, got 'a'"),
        ([0, None, 1], "label", None, "whole number for each image"),
        ([0, 1, 2], "class", None, "`label_column` 'class' is not among the columns .*'label'"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, labels, column, feature, message):
    data_set(labels, feature).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path), label_column=column)


def test_training_ends_in_a_model_of_classes(folder, tmp_path):
    run = trainer(folder, tmp_path, validation_steps=4)
    seen = []
    run.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["class_labels"].tolist())), with_kwargs=True
    )
    table = run.network.class_embedding.weight.detach().clone()
    result = run.train()
    write_report(run.config, result)
    loaded = VSDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.num_classes == 4 and not loaded.scheduler.drift.is_neutral
    arguments = {"num_inference_steps": 2, "output_type": "pt", "class_labels": 1, "guidance_scale": 2.0}
    assert torch.equal(*(p(2, generator(), **arguments).images for p in (loaded, result.pipeline)))
    # stages simulate without a class; pictures show all of them
    evaluations = [labels for training, labels in seen if not training]
    assert evaluations.count([4] * 4) == 2 * 3 and [0, 1, 2, 3] in evaluations
    assert (loaded.unet.class_embedding.weight != table).any()
    card = (tmp_path / "README.md").read_text()
    assert "class_labels=0, guidance_scale=2.0" in card and "class-conditional-generation" in card
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["label_dropout"] == 0.1


def test_labels_go_with_their_images_but_for_the_share_left_out(folder, tmp_path):
    run = trainer(folder, tmp_path, label_dropout=0.3, baseline="sgm")
    data = load_images(str(folder), label_column="label")
    known = {image.numpy().tobytes(): int(label) for image, label in zip(data, data.labels, strict=True)}
    number = left_out = 0
    batches = run._batches()
    for _ in range(400):
        sample, _, _, condition, _ = run._draw(*next(batches))
        for image, label in zip(sample, condition["class_labels"].tolist(), strict=True):
            assert label in (known[image.numpy().tobytes()], 4)
            number, left_out = number + 1, left_out + (label == 4)
    assert abs(left_out / number - 0.3) < 4 * (0.3 * 0.7 / number) ** 0.5


def test_labels_leave_the_other_draws_as_they_are(folder, tmp_path):
    runs = [trainer(folder, tmp_path, class_conditional=flag, random_flip=True) for flag in (False, True)]
    plain, labelled = (run._draw(*next(run._batches())) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], labelled[:3], strict=True))
    assert plain.condition == {} and labelled.condition["class_labels"].shape == (4,)


def test_processes_draw_what_one_draws(folder, tmp_path):
    """Each for the whole batch, of which it keeps its part."""
    run = trainer(folder, tmp_path, label_dropout=0.5)
    sample, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    whole = run._draw(3, (sample, labels)).condition["class_labels"]
    parts = []
    for i in range(2):
        part = slice(4 * i, 4 * i + 4)
        run.accelerator = type(
            "Accelerator", (), {"num_processes": 2, "process_index": i, "device": torch.device("cpu")}
        )
        parts.append(run._draw(3, (sample[part], labels[part])).condition["class_labels"])
    assert torch.equal(torch.cat(parts), whole) and 0 < (whole == 4).sum() < 8


def test_a_resumed_run_of_classes_is_the_uninterrupted_one(folder, tmp_path):
    settings = {"random_flip": True, "label_dropout": 0.5, "dataloader_num_workers": 1}
    whole = trainer(folder, tmp_path / "whole", **settings)
    trainer(folder, tmp_path / "parts", checkpointing_steps=5, **settings).train()
    resumed = trainer(folder, tmp_path / "parts", resume_from_checkpoint="checkpoint-5", **settings)
    for run, name in ((whole, "whole"), (resumed, "parts")):
        run.train().pipeline.save_pretrained(tmp_path / name)
    assert torch.equal(whole.losses, resumed.losses)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert Path("unet/diffusion_pytorch_model.safetensors") in files
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file


def test_a_checkpoint_from_before_a_setting_is_of_a_run_with_its_default(folder, tmp_path):
    trainer(folder, tmp_path, class_conditional=False, checkpointing_steps=8).train()
    file = tmp_path / "checkpoint-8" / "state.json"
    state = json.loads(file.read_text())
    for name in ("class_conditional", "label_column", "label_dropout", "split"):
        del state["config"][name]
    file.write_text(json.dumps(state))
    trainer(folder, tmp_path, class_conditional=False, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="other settings of `class_conditional`"):
        trainer(folder, tmp_path, resume_from_checkpoint="latest")


def test_networks_must_know_the_classes_of_the_run(folder, tmp_path):
    build_model("tiny", (3, 8, 8), 100).save_config(tmp_path / "unet")
    run = trainer(folder, tmp_path / "model", model_config_name_or_path=str(tmp_path / "unet"))
    assert num_classes(run.network) == 4
    for classes, flag, message in (
        (None, True, "`num_class_embeds` None, the run 4 classes"),
        (3, True, "`num_class_embeds` 4, the run 4 classes"),
        (4, False, "`num_class_embeds` 5, the run no classes"),
    ):
        VSDMPipeline(build_model("tiny", (3, 8, 8), 100, num_classes=classes), VSDMScheduler()).save_pretrained(
            tmp_path / "start"
        )
        with pytest.raises(ValueError, match=message):
            trainer(
                folder,
                tmp_path / "model",
                class_conditional=flag,
                pretrained_model_name_or_path=str(tmp_path / "start"),
                ddpm_num_steps=100,
            )


def test_bad_settings_of_classes(folder, tmp_path):
    with pytest.raises(ValueError, match="`label_dropout` must lie in"):
        trainer(folder, tmp_path, label_dropout=0.0)
    with pytest.raises(ValueError, match="not for vectors"):
        Trainer(TrainingConfig(class_conditional=True, num_likelihood_samples=0))
    with pytest.raises(ValueError, match="`model` 'mlp' knows no classes"):
        build_model("mlp", (2,), 100, num_classes=3)
    with pytest.raises(ValueError, match="`label_column` 'kind' is not among"):
        trainer(folder, tmp_path, label_column="kind")


@pytest.mark.parametrize("name, millions", [("ddpm-cifar10", 35.7), ("ddpmpp-cifar10", 57.2)])
def test_published_networks_have_their_size(name, millions):
    with torch.device("meta"):
        network = build_model(name, (3, 32, 32), 1000)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert network.config["sample_size"] == 32
