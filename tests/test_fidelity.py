"""FID and its kin, and the pieces in which `training/evaluate.py` samples."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import save_file

from diffusers_vsdm import AdaptiveDiagonalDrift, BridgePipeline, VSDMPipeline, VSDMScheduler
from diffusers_vsdm.data.images import DecodedImages, ImageDataset, as_bytes
from diffusers_vsdm.metrics.fidelity import (
    FeatureStatistics,
    InceptionFeatures,
    fid_name,
    frechet_distance,
    kernel_distance_and_coverage,
)
from diffusers_vsdm.trainer import TrainingConfig, fidelity, loop
from diffusers_vsdm.trainer.evaluation import EvaluationConfig, evaluate
from diffusers_vsdm.trainer.fidelity import SamplingRun, measure_fidelity, reference_features
from diffusers_vsdm.trainer.shards import load_shards, make_shards

from .processes import run_python, run_two


def has_torch_fidelity():
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):  # the latter from a torchvision that is not for this torch
        return False
    return True


needs_torch_fidelity = pytest.mark.skipif(
    not has_torch_fidelity(), reason="torch-fidelity, extra [fid], cannot be imported beside this torch"
)


class Means:
    """Features that a test can compute by hand: the images' means over quadrants."""

    digest = "means"

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


class ListOfImages(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(4, 3, 3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    scheduler = VSDMScheduler.from_power_law(num_train_timesteps=20)
    drift = AdaptiveDiagonalDrift((3, 4, 4))
    drift.set_lambda(0.5 + torch.rand(3, 4, 4))
    scheduler.set_drift(drift)
    return VSDMPipeline(network.eval(), scheduler)


@pytest.fixture
def distances(monkeypatch):
    """torch-fidelity's place, for what does not need it."""
    monkeypatch.setattr(fidelity, "frechet_distance", lambda features, statistics: float(features.mean()))
    monkeypatch.setattr(fidelity, "kernel_distance_and_coverage", lambda *_: {"kid": 0.0})


def measure(pipeline, folder, runs=("ddim@4",), number=10, batch_size=4, **settings):
    found = [SamplingRun.parse(run) for run in runs]
    statistics = FeatureStatistics.of(torch.randn(9, 12))
    return measure_fidelity(pipeline, found, number, batch_size, 0, folder, Means(), statistics, None, **settings)


# Sampling runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["heun@35", "ddim@6", "dpmsolver++:3/karras@10", "unipc:2@5", "trig/log_snr_mean@8"])
def test_runs_are_read_and_written(text):
    assert str(SamplingRun.parse(text)) == text


@pytest.mark.parametrize(
    "text, calls",
    [("ddim@7", 7), ("heun@7", 7), ("heun@6", 5), ("heun@1", 1), ("trig@6", 6), ("dpmsolver++:3@20", 20)],
)
def test_a_run_takes_as_many_network_calls_as_it_may(text, calls):
    run = SamplingRun.parse(text)
    scheduler = run.scheduler(VSDMScheduler())
    scheduler.set_timesteps(run.num_steps)
    assert len(scheduler.timesteps) == calls


@pytest.mark.parametrize("text", ["heun", "heun@", "euler2@4", "heun/cosine@9", "ddim@0", "heun@x", "@5"])
def test_what_is_not_a_run(text):
    with pytest.raises(ValueError, match="runs"):
        SamplingRun.parse(text)


# Pieces ------------------------------------------------------------------------------------------------------------


def test_pieces_are_made_once(tmp_path):
    made = []

    def make(first, last):
        made.append((first, last))
        return {"x": torch.arange(first, last)}

    make_shards(tmp_path, "key", 10, 4, make, "")
    assert made == [(0, 4), (4, 8), (8, 10)]
    (tmp_path / "shard-00001.safetensors").unlink()
    make_shards(tmp_path, "key", 10, 4, make, "")
    assert made[3:] == [(4, 8)]
    assert torch.equal(load_shards(tmp_path, 10, 4, "x"), torch.arange(10))
    for settings in (("other", 10, 4), ("key", 9, 4), ("key", 10, 5)):
        with pytest.raises(ValueError, match="other settings"):
            make_shards(tmp_path, *settings, make, "")
    path = tmp_path / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="damaged"):
        make_shards(tmp_path, "key", 10, 4, make, "")


def test_an_interrupted_evaluation_goes_on_and_is_the_same(pipeline, distances, tmp_path):
    whole = measure(pipeline, tmp_path / "whole", ("ddpm@4", "heun@5")).rows
    broken = tmp_path / "broken"

    class Stops(Means):
        left = 2

        def __call__(self, images):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__call__(images)

    runs = [SamplingRun.parse(run) for run in ("ddpm@4", "heun@5")]
    statistics = FeatureStatistics.of(torch.randn(9, 12))
    with pytest.raises(KeyboardInterrupt):
        measure_fidelity(pipeline, runs, 10, 4, 0, broken, Stops(), statistics, None)
    assert len(list(broken.rglob("*.safetensors"))) == 2
    assert measure(pipeline, broken, ("ddpm@4", "heun@5")).rows == whole
    assert [row["evaluations"] for row in whole] == [4, 5]
    assert (broken / "samples" / "ddpm@4.png").is_file()


def test_pieces_of_another_model_are_refused(pipeline, distances, tmp_path):
    measure(pipeline, tmp_path)
    measure(pipeline, tmp_path)
    pipeline.scheduler.drift.set_lambda(0.5)
    with pytest.raises(ValueError, match="another model"):
        measure(pipeline, tmp_path)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="another model"):
        measure(pipeline, tmp_path)


def test_the_digest_does_not_depend_on_what_diffusers_notes(pipeline):
    """Which keys were not given: a list in the order of a set, and so another one in another process."""
    before = fidelity.digest(pipeline)
    notes = pipeline.scheduler.config["_use_default_values"]
    assert len(notes) > 1
    pipeline.scheduler.register_to_config(_use_default_values=notes[::-1])
    assert fidelity.digest(pipeline) == before


def test_runs_start_from_the_same_noise(pipeline, distances, tmp_path):
    """So that solvers are compared on the same samples: in many calls they agree."""
    measure(pipeline, tmp_path, ("ddim@20", "dpmsolver++:2@20"), number=4)
    ddim, multistep = (
        load_shards(tmp_path / "samples" / name, 4, 4, "images").float() for name in ("ddim@20", "dpmsolver++:2@20")
    )
    assert (ddim - multistep).abs().mean() < 0.1 * (ddim - ddim.roll(1, 0)).abs().mean()


def test_classes_take_turns_and_may_be_guided(distances, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    network = UNet2DModel(4, 3, 3, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=4, **blocks)
    pipeline, asked = VSDMPipeline(network.eval(), VSDMScheduler.from_power_law()), []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    measure(pipeline, tmp_path / "plain", ("ddim@1",), number=8)
    assert asked == [[0, 1, 2, 0], [1, 2, 0, 1]]
    measure(pipeline, tmp_path / "guided", ("ddim@1",), number=4, guidance_scale=2.0)
    assert sorted(asked[2]) == [0, 0, 1, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="other settings"):
        measure(pipeline, tmp_path / "plain", ("ddim@1",), number=8, guidance_scale=2.0)


def test_guidance_needs_classes(pipeline, distances, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale"):
        measure(pipeline, tmp_path, guidance_scale=2.0)


TWO_PROCESSES = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from diffusers_vsdm.trainer import evaluation, fidelity
from tests.test_fidelity import Means
evaluation.InceptionFeatures = lambda *_: Means()
fidelity.frechet_distance = lambda features, statistics: float(features.mean())
config = evaluation.EvaluationConfig(
    pretrained_model_name_or_path={model!r}, fidelity=True, statistics={statistics!r}, output_dir=sys.argv[1],
    num_images=10, batch_size=3, runs=["ddpm@4"],
)
made, write, rank = [], fidelity.make_shards, os.environ.get("RANK", "0")
def counting(folder, key, number, size, make, description):
    time.sleep(int(rank))
    write(folder, key, number, size, lambda first, last: made.append(first) or make(first, last), description)
fidelity.make_shards = counting
record = evaluation.evaluate(config)
Path(sys.argv[1], f"rank-{{rank}}.json").write_text(json.dumps([made, record.get("runs")]))
"""


def test_processes_share_the_pieces(pipeline, tmp_path):
    """Two of them, by torchrun, one a second late: each makes its half, and the samples are those of one."""
    pipeline.save_pretrained(tmp_path / "model")
    FeatureStatistics.of(torch.randn(9, 12)).save(tmp_path / "statistics.npz")
    root = Path(__file__).parents[1]
    names = {"root": str(root), "model": str(tmp_path / "model"), "statistics": str(tmp_path / "statistics.npz")}
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run_two(TWO_PROCESSES.format(**names), tmp_path, tmp_path / "out-2")
    outcome = run_python([tmp_path / "script.py", tmp_path / "out-1"], env=environment)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    found = [json.loads((tmp_path / "out-2" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    (alone,) = [json.loads((tmp_path / "out-1" / "rank-0.json").read_text())]
    assert [made for made, _ in found] == [[0, 6], [3, 9]] and alone[0] == [0, 3, 6, 9]
    assert found[0][1] == alone[1] and found[1][1] is None
    for name in ("images", "features"):
        one, two = (load_shards(tmp_path / f"out-{n}" / "samples" / "ddpm@4", 10, 3, name) for n in (1, 2))
        assert torch.equal(one, two)


def test_a_bridge_samples_with_both_networks(pipeline, distances, tmp_path):
    forward = UNet2DModel.from_config(pipeline.unet.config)
    bridge = BridgePipeline(pipeline.unet, pipeline.scheduler, forward_unet=forward)
    plain, both = (
        measure(p, tmp_path / name).rows[0]["fid"] for name, p in {"plain": pipeline, "both": bridge}.items()
    )
    assert plain != both
    for run, calls in {"ddim@4": 8, "ddpm@4": 4}.items():
        (row,) = measure(bridge, tmp_path / "both", [run]).rows
        assert row["evaluations"] == calls
    with torch.no_grad():
        next(forward.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="another model"):
        measure(bridge, tmp_path / "both")
    assert bridge.scheduler is pipeline.scheduler


def test_samples_that_are_not_finite_name_their_run(pipeline, distances, tmp_path):
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="ddim@4.*NaN"):
        measure(pipeline, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bytes_survive():
    """From a file to [-1, 1] and back, and from a pipeline's [0, 1]."""
    levels = torch.arange(256)
    for images in (levels.float() / 127.5 - 1, 2 * (levels.float() / 255) - 1):
        assert torch.equal(as_bytes(images), levels.to(torch.uint8))


def test_decoded_images_are_the_images():
    """What a GPU keeps is what the data set reads, with its labels."""
    pictures = [np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8) for seed in range(5)]
    images = ImageDataset(
        [{"image": Image.fromarray(p)} for p in pictures], "image", labels=torch.arange(5), num_classes=5
    )
    decoded = DecodedImages(images, torch.device("cpu"))
    assert len(decoded) == 5 and decoded.event_shape == images.event_shape == (3, 4, 6)
    assert torch.equal(decoded.__getitems__([4, 0, 4]), images.__getitems__([4, 0, 4]))
    assert decoded.labels is images.labels and decoded.num_classes == 5


def test_few_samples_are_told(pipeline, distances, tmp_path):
    report = measure(pipeline, tmp_path)
    assert "FID (10 samples, 9 of the data)" in report.table()
    assert fid_name(9_999) == "FID (9,999 samples)" and fid_name(10_000) == fid_name(10_000, 10_000) == "FID"
    assert fid_name(50_000, 500) == "FID (500 of the data)"


def test_features_of_other_data_are_not_taken(tmp_path):
    """Of as many images of the same size."""
    dark, bright = (
        ImageDataset([{"image": np.full((4, 4, 3), i, np.uint8)} for i in range(start, start + 9)], "image")
        for start in (0, 200)
    )
    assert reference_features(dark, 9, 0, tmp_path, Means()).mean() < 10
    with pytest.raises(ValueError, match="another"):
        reference_features(bright, 9, 0, tmp_path, Means())


def test_a_small_fid_while_training_changes_nothing_else(distances, monkeypatch, tmp_path):
    """With images of noise: every picture has its number in the log, and the model is what it is without."""
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{seed}.png")
    monkeypatch.setattr(loop, "InceptionFeatures", lambda *_: Means())
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    UNet2DModel(4, 3, 3, block_out_channels=(8,), norm_num_groups=4, **blocks).save_config(tmp_path / "network")
    settings = {"train_data_dir": str(tmp_path / "data"), "dataset_name": "", "output_dir": str(tmp_path / "run")}
    settings |= {"model_config_name_or_path": str(tmp_path / "network"), "max_train_steps": 6, "baseline": "sgm"}
    settings |= {"train_batch_size": 4, "validation_steps": 3, "ddpm_num_inference_steps": 2, "eval_batch_size": 2}
    weights, logged, key = [], [], "FID (5 samples, 8 of the data)"
    for more in ({}, {"validation_images": 5}):
        trainer = loop.Trainer(TrainingConfig(**settings, **more))
        monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: logged.append((step, values)))
        weights.append(trainer.train().pipeline.unet.state_dict())
    found = {step: values[key] for step, values in logged if key in values}
    assert list(found) == [3, 6] and found[3] != found[6]
    kept = {step: tmp_path / "run" / "validation" / f"step-{step}.json" for step in found}
    assert {step: json.loads(file.read_text())[key] for step, file in kept.items()} == found
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    FeatureStatistics.of(torch.randn(9, 12), shape="3x8x8").save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="another shape"):
        loop.Trainer(TrainingConfig(**settings, validation_images=5, statistics=str(tmp_path / "other.npz")))
    FeatureStatistics.of(torch.randn(9, 64)).save(tmp_path / "other.npz")  # as other programs write them
    with pytest.raises(ValueError, match="64 features"):
        loop.Trainer(TrainingConfig(**settings, validation_images=5, statistics=str(tmp_path / "other.npz")))


def test_samples_that_are_not_finite_do_not_end_a_training(monkeypatch):
    def overflows():
        raise FloatingPointError("NaN")

    told = []
    monkeypatch.setattr(loop.logger, "warning", lambda text, *values: told.append(text % values))
    assert loop.Trainer._measured("FID", overflows) is None and told == ["The FID was not measured: NaN"]


@pytest.mark.parametrize("settings", [{"validation_images": 1}, {"validation_steps": 0}, {"dataset_name": "moons"}])
def test_a_small_fid_needs_pictures(settings):
    given = {"dataset_name": "uoft-cs/cifar10", "validation_images": 100, "validation_steps": 10} | settings
    with pytest.raises(ValueError, match="validation_images"):
        TrainingConfig(**given)


# Statistics --------------------------------------------------------------------------------------------------------


def test_statistics_survive_their_file(tmp_path):
    features = torch.randn(50, 6).double()
    FeatureStatistics.of(features, network="abc", shape="3x4x4").save(tmp_path / "s.npz")
    found = FeatureStatistics.load(tmp_path / "s.npz")
    np.testing.assert_allclose(found.mean, features.mean(0))
    np.testing.assert_allclose(found.covariance, features.T.cov())
    assert found.num_samples == 50
    found.check(network="abc", shape="3x4x4")
    with pytest.raises(ValueError, match="another network"):
        found.check(network="abd")


def test_statistics_of_other_data_are_refused():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 40, generator=generator) / 6
    ours, same, other = (torch.randn(3000, 40, generator=generator) @ mixing + shift for shift in (0, 0, 0.3))
    statistics = FeatureStatistics.of(ours)
    statistics.check(same)
    FeatureStatistics.of(ours[:60]).check(same)  # their own mean is not known well
    for known in (statistics, FeatureStatistics.of(ours[:1000])):
        with pytest.raises(ValueError, match="not of these data"):
            known.check(other)
    with pytest.raises(ValueError, match="another network"):
        statistics.check(same[:, :30])


@pytest.mark.parametrize("damage", ["short", "text", "keys", "shapes", "nan", "absent"])
def test_files_that_are_no_statistics(tmp_path, damage):
    path = tmp_path / "s.npz"
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3)}
    arrays |= {"shapes": {"sigma": np.eye(2)}, "nan": {"mu": np.full(3, np.nan)}}.get(damage, {})
    np.savez(path, **({"mean": np.zeros(3)} if damage == "keys" else arrays))
    if damage == "short":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("mu")
    elif damage == "absent":
        path.unlink()
    with pytest.raises(ValueError, match="s.npz"):
        FeatureStatistics.load(path)


def test_too_few_samples_for_a_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStatistics.of(torch.randn(1, 4))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics.of(torch.full((5, 4), torch.nan))


# torch-fidelity ----------------------------------------------------------------------------------------------------


@needs_torch_fidelity
def test_the_distance_of_gaussians_is_the_closed_form():
    """With commuting covariances: |m1 - m2|^2 + sum (sd1 - sd2)^2."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400_000, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    statistics = FeatureStatistics(np.array([1.0, 0, 0, 0]), np.diag([4.0, 1.0, 0.25, 1.0]))
    assert frechet_distance(features, statistics) == pytest.approx(1 + 1 + 1, rel=0.02)
    with pytest.raises(ValueError, match="another network"):
        frechet_distance(features[:, :3], statistics)


@needs_torch_fidelity
def test_the_same_law_has_no_kernel_distance_and_full_coverage():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 600, 8, generator=generator)
    same, shifted = kernel_distance_and_coverage(x, y), kernel_distance_and_coverage(x + 2, y)
    assert abs(same["kid"]) < 4 * same["kid_std"] and same["precision"] > 0.8 and same["recall"] > 0.8
    assert shifted["kid"] > 10 * shifted["kid_std"] and shifted["precision"] < 0.5


@pytest.fixture
def weights():
    if "VSDM_TEST_DATA" not in os.environ:
        pytest.skip("VSDM_TEST_DATA is not set: the feature network's weights are there")
    return Path(os.environ["VSDM_TEST_DATA"]) / "fid" / "inception_2015_12_05_features.safetensors"


@needs_torch_fidelity
def test_features_are_torch_fidelitys(weights, tmp_path):
    """Of eight noise images, through its own function with the same weights; gray images count as colours."""
    import torch_fidelity

    features = InceptionFeatures(weights)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    torch.save(features.network.state_dict(), tmp_path / "inception.pth")
    theirs = torch_fidelity.calculate_metrics(
        input1=ListOfImages(images),
        input2=ListOfImages(images.flip(0)[:6]),
        cuda=False,
        fid=True,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
        cache=False,
        verbose=False,
    )
    statistics = FeatureStatistics.of(features(images.flip(0)[:6]))
    ours = frechet_distance(features(images), statistics)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    gray = images[:1, :1]
    torch.testing.assert_close(features(gray), features(gray.expand(1, 3, 32, 32)))


@needs_torch_fidelity
@pytest.mark.parametrize("damage", ["short", "absent", "other"])
def test_weights_that_are_none(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, path)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:30])
    if damage == "absent":
        path.unlink()
    with pytest.raises(ValueError, match="weights.safetensors"):
        InceptionFeatures(path)


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"diffusers-vsdm\[fid\]"):
        InceptionFeatures()


# The command's settings --------------------------------------------------------------------------------------------

GIVEN = {"pretrained_model_name_or_path": "x", "fidelity": True, "statistics": "s.npz", "output_dir": "y"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output_dir": ""}, "output_dir"),
        ({"dataset_name": "moons"}, "toy"),
        ({"statistics": ""}, "train_data_dir"),
        ({"save_statistics": "t.npz"}, "train_data_dir"),
        ({"runs": ["heun"]}, "runs"),
        ({"num_images": 1}, "num_images"),
        ({"mixed_precision": "int8"}, "mixed_precision"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    EvaluationConfig(**GIVEN)
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**GIVEN | settings)


def test_vectors_have_no_fid(tmp_path):
    config = GIVEN | {"pretrained_model_name_or_path": "model_cards/spiral-8y", "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="images"):
        evaluate(EvaluationConfig(**config))
