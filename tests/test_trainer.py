import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_vsdm import MLPModel, VSDMPipeline
from diffusers_vsdm.trainer import TrainingConfig, algorithm, loop, processes, setup, train
from diffusers_vsdm.trainer.report import evaluate, write_report

from .processes import run_python


SCRIPT = Path(__file__).parents[1] / "training" / "train_vsdm.py"
TINY = {
    "max_train_steps": 60,
    "sa_stages": 5,
    "sa_trajectories": 32,
    "num_train_samples": 2000,
    "train_batch_size": 64,
    "model_width": 16,
    "model_num_blocks": 1,
    "num_eval_samples": 200,
    "num_likelihood_samples": 0,
}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)


def tiny(**settings):
    return TrainingConfig(**(TINY | settings))


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_saved_lambda_is_the_one_the_network_was_last_trained_at(tmp_path, monkeypatch, use_ema):
    trained_at, averages = [], []
    score_matching, ema_class = algorithm.denoising_score_matching, algorithm.EMAModel

    def record(scheduler, *args):
        trained_at.append(scheduler.drift.lam.clone())
        return score_matching(scheduler, *args)

    class Ema(ema_class):
        def copy_to(self, parameters):
            averages.append(self.optimization_step)
            super().copy_to(parameters)

    monkeypatch.setattr(algorithm, "denoising_score_matching", record)
    monkeypatch.setattr(algorithm, "EMAModel", Ema)
    result = train(tiny(use_ema=use_ema))
    result.pipeline.save_pretrained(tmp_path)
    saved = VSDMPipeline.from_pretrained(tmp_path).scheduler.drift
    assert len(trained_at) == 60
    assert all(torch.equal(lam, saved.lam) for lam in trained_at[48:])
    # it had moved before, and what is frozen is the average
    assert not torch.equal(trained_at[47], saved.lam) and len({tuple(lam.tolist()) for lam in trained_at}) == 7
    assert result.lambdas.shape == (6, 2) and int(saved.num_updates) == 5
    # the averaged weights saw the frozen lambda alone
    assert averages[-1:] == ([12] if use_ema else [])


def test_straightness_is_measured_on_a_uniform_grid():
    """An exact flow, sampled at every step or at every fourth (the last step is shorter): the same curvature."""
    from .problems import DiagonalGaussian, scheduler_for

    problem = DiagonalGaussian(*(torch.tensor(x).double() for x in ([1.0, 2.0], [4.0, 25.0], [0.7, 1.5])))
    scheduler = scheduler_for(problem, prior_type="marginal")

    class Exact(MLPModel):
        def forward(self, sample, timestep, return_dict=True):
            return (problem.eps(sample.double(), scheduler.integrated_beta[int(timestep)]).to(sample.dtype),)

    pipeline = VSDMPipeline(Exact(2, 100, 4, 1), scheduler)
    fine, coarse = (evaluate(pipeline, "gaussian", 500, steps)[0] for steps in (99, 25))
    assert coarse["num_function_evaluations"] == 25 and fine["num_function_evaluations"] == 99
    assert coarse["straightness"] == pytest.approx(fine["straightness"], rel=0.15)


def test_baseline_keeps_lambda_at_one():
    result = train(tiny(baseline="sgm"))
    assert result.pipeline.scheduler.drift.is_neutral and result.sa_seconds == 0 and len(result.lambdas) == 1


@pytest.mark.parametrize("given, used", [("auto", "v_prediction"), ("epsilon", "epsilon")])
def test_networks_for_vectors_predict_v_unless_told_otherwise(given, used):
    assert loop.Trainer(tiny(prediction_type=given)).scheduler.config["prediction_type"] == used


def test_vectors_of_ones_own():
    data = torch.randn(500, 5) @ torch.randn(5, 5)
    result = train(tiny(basis="dense", standardize=True), data)
    assert _quiet(result.pipeline)(7).samples.shape == (7, 5)
    with pytest.raises(ValueError, match="NaN"):
        train(tiny(), data / 0)


def test_runs_repeat_and_seeds_differ():
    weights = [next(train(tiny(seed=seed)).pipeline.unet.parameters()) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "v_prediction", "weighting": "min_snr"},
        {"prediction_type": "sample", "weighting": "epsilon", "lr_scheduler": "constant_with_warmup"},
        {"ddpm_beta_schedule": "squaredcos_cap_v2", "zeta_placement": "inner_product", "sa_average": "ema"},
        {"sa_prior": "marginal", "mixed_precision": "bf16", "standardize": True},
        {"basis": "dense", "solver": "trig"},
        {"lambda_varies": True, "zeta": 1.0},
        {"basis": "dense", "lambda_varies": True, "zeta": 1.0, "sa_update": "ipf", "sa_average": "last"},
    ],
)
def test_every_setting_trains_something_that_samples(settings):
    result = train(tiny(**settings))
    metrics, paths = evaluate(result.pipeline, "spiral-8y", 100, 99)
    assert paths.isfinite().all() and metrics["num_function_evaluations"] == 99


def test_pictures_while_training_change_nothing(tmp_path):
    """Neither the numbers of a run, nor the random state of whoever trains, nor their plots' backend."""
    runs = []
    for steps in (0, 20):
        settings = {"validation_steps": steps, "solver": "ddpm", "output_dir": str(tmp_path / str(steps))}
        trainer = loop.Trainer(tiny(**settings))
        runs.append((trainer.train(), trainer.losses, torch.rand(3)))
    (plain, losses, after), (pictured, *others) = runs
    assert torch.equal(plain.lambdas, pictured.lambdas) and torch.equal(losses, others[0])
    assert torch.equal(after, others[1])
    weights = (result.pipeline.unet.parameters() for result in (plain, pictured))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    names = sorted(path.name for path in (tmp_path / "20" / "validation").iterdir())
    assert names == ["step-20.png", "step-40.png", "step-60.png"] and not (tmp_path / "0").exists()


def test_epochs_count_as_steps():
    config = tiny(num_epochs=3, gradient_accumulation_steps=2).for_data(1000, num_processes=2)
    assert config.max_train_steps == 3 * (1000 // 128) // 2 and not config.num_epochs
    trainer = loop.Trainer(tiny(num_epochs=2, sa_stages=3))
    trainer.train()
    assert trainer.step == 2 * (2000 // 64) and trainer.sampler.epoch == 1
    with pytest.raises(ValueError, match="`num_epochs`.*31 batches"):
        tiny(num_epochs=1, gradient_accumulation_steps=100).for_data(2000)


def test_half_precision_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="needs a GPU, not 'cpu': use 'bf16'"):
        train(tiny(mixed_precision="fp16"))


def test_training_learns_a_gaussian(tmp_path):
    """A real run, short: the samples have the data's moments and lambda has moved."""
    result = train(
        tiny(dataset_name="gaussian", standardize=True, max_train_steps=1500, model_width=32, train_batch_size=256)
    )
    samples = torch.from_numpy(_quiet(result.pipeline)(4000, torch.Generator().manual_seed(0)).samples)
    assert samples.mean(0).tolist() == pytest.approx([-8, 2], abs=0.3)
    torch.testing.assert_close(samples.T.cov(), torch.tensor([[1.0, 1.0], [1.0, 5.0]]), rtol=0.2, atol=0.2)
    assert (result.pipeline.scheduler.drift.lam < 0.95).all()


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_loss_that_blows_up_is_reported():
    with pytest.warns(RuntimeWarning, match="not finite"), pytest.raises(FloatingPointError, match="learning_rate"):
        train(tiny(learning_rate=1e20, lr_warmup_steps=0, max_grad_norm=1e30))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"solver": "magic"}, "`solver`"),
        ({"zeta": 0.0}, "`zeta`"),
        ({"max_train_steps": 0}, "`max_train_steps`"),
        ({"frozen_fraction": 1.0}, "`frozen_fraction`"),
        ({"sa_stages": 60}, "`sa_stages`"),
        ({"basis": "dct"}, "`basis`"),
        ({"lambda_varies": True}, "`zeta`"),
        ({"sa_update": "ipf"}, "`zeta`"),
        ({"seed": -1}, "`seed`"),
        ({"beta_max": 0.01}, "`beta_max`"),
        ({"sa_step_power": 0.3}, "`sa_step_power`"),
        ({"lr_scheduler": "foo"}, "`lr_scheduler`"),
        ({"num_likelihood_samples": 1}, "`num_likelihood_samples`"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded.*toys are spiral, spiral-8y"):
        train(tiny(train_data_dir=str(tmp_path / "no" / "such" / "folder")))


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="2000 samples, less than a batch"):
        train(tiny(train_batch_size=3000))
    with pytest.raises(ValueError, match=r"less than a batch on each process \(3000\)"):
        tiny(train_batch_size=1500).for_data(2000, num_processes=2)


def test_bad_data_is_refused(monkeypatch):
    monkeypatch.setattr(setup, "sample_toy", lambda *args: torch.full((2000, 2), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        train(tiny())


def test_what_would_fail_after_hours_is_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match="`num_inference_steps`.*between 1 and 100"):
        loop.Trainer(tiny(ddpm_num_inference_steps=1000))
    for name in ("checkpoints_total_limit", "checkpointing_steps", "validation_steps", "sa_stages"):
        with pytest.raises(ValueError, match=f"`{name}` must not be negative"):
            tiny(**{name: -1})
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="`logger` 'tensorboard' is not installed"):
        loop.Trainer(tiny(logger="tensorboard"))


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch):
    """Which is what `accelerate launch --cpu --num_processes 2` starts."""
    for name in processes.WORLD_SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    processes.process_state()
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="--multi_gpu --num_processes N"):
        processes.process_state()


def test_stages_simulate_from_the_prior_that_is_sampled_from():
    settings = {"ddpm_beta_schedule": "brownian", "sigma_max": 0.3}
    assert loop.Trainer(tiny(**settings, prior_type="standard")).approximation.prior_variance == 1
    found = loop.Trainer(tiny(**settings, prior_type="conditional")).approximation.prior_variance
    assert abs(found - 0.09) < 1e-6


def test_dropout_has_a_stream_of_its_own():
    """On a GPU two generators of one seed draw the same words."""
    device, streams = torch.device("cpu"), []
    for seed in range(4):
        setup.seed_dropout(seed, device)
        streams += [torch.rand(8), torch.rand(8, generator=torch.Generator().manual_seed(seed))]
    assert len({tuple(stream.tolist()) for stream in streams}) == 8


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite_output_dir"):
        tiny(output_dir=str(tmp_path)).prepare_output_dir()
    tiny(output_dir=str(tmp_path), overwrite_output_dir=True).prepare_output_dir()
    tiny(output_dir=str(tmp_path / "new")).prepare_output_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        tiny(output_dir=str(tmp_path / "file"), overwrite_output_dir=True).prepare_output_dir()


def test_report_holds_everything(tmp_path):
    config = tiny(output_dir=str(tmp_path), standardize=True)
    record = write_report(config, train(config))
    for name in ("samples.png", "drift.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(record))
    assert stored["config"]["seed"] == 0 and stored["versions"]["torch"] == torch.__version__
    metrics = stored["metrics"]
    assert metrics["lambda"] == VSDMPipeline.from_pretrained(tmp_path).scheduler.drift.lam.tolist()
    # measured again from the saved files
    again, _ = evaluate(_quiet(VSDMPipeline.from_pretrained(tmp_path)), "spiral-8y", 200, 99)
    assert {key: metrics[key] for key in again} == again

    card = ModelCard.load(tmp_path / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["straightness, dimension 1"] == round(metrics["straightness"][1], 4)
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert "{{" not in card.text and "spiral-8y" in card.text


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A run of the command line, through `accelerate launch`."""
    folder = tmp_path_factory.mktemp("launched") / "model"
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", str(SCRIPT)]
    command += [f"--output_dir={folder}", "--standardize", "--logger=tensorboard", "--logging_steps=10", *flags]
    command += ["--validation_steps=30", "--num_likelihood_samples=20"]
    subprocess.run(
        command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=120
    )
    return folder


def test_the_command_line_leaves_a_whole_model(launched):
    present = {path.name for path in launched.iterdir()}
    expected = {"unet", "scheduler", "normalizer", "model_index.json", "metrics.json", "samples.png", "drift.png"}
    assert present == expected | {"README.md", "pipeline.py", "logs", "validation"}
    samples = _quiet(VSDMPipeline.from_pretrained(launched))(10).samples
    assert samples.shape == (10, 2)


def test_tensorboard_has_loss_lambda_and_pictures(launched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, pictures = set(), {}
    for path in launched.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path))
        events.Reload()
        scalars |= set(events.Tags()["scalars"])
        pictures |= {name: events.Images(name) for name in events.Tags()["images"]}
    assert {"loss", "lr", "lambda/0", "lambda/1", "moment/0"} <= scalars
    assert {"likelihood/nll", "likelihood/bound", "likelihood/prior_loss", "likelihood/drift_matching"} <= scalars
    assert [picture.step for picture in pictures["samples"]] == [30, 60]
    shown, stored = io.BytesIO(pictures["samples"][1].encoded_image_string), launched / "validation" / "step-60.png"
    assert np.array_equal(np.asarray(Image.open(shown)), np.asarray(Image.open(stored)))


def test_the_likelihood_is_in_the_card_and_measured_again_by_the_command_line(launched, tmp_path):
    told = json.loads((launched / "metrics.json").read_text())["metrics"]["likelihood"]
    card = (launched / "README.md").read_text()
    assert f"| {told['nll']:.3f} ± {told['nll_standard_error']:.3f} |" in card
    assert f"prior loss | {told['prior_loss']:.3f} ±" in card and f"matching | {told['drift_matching']:.3f} ±" in card
    assert told["bound"] == pytest.approx(told["prior_loss"] + told["drift_matching"] + told["reconstruction"])
    command = [SCRIPT.with_name("evaluate.py"), "--likelihood", "--dataset_name=spiral-8y"]
    command += [f"--pretrained_model_name_or_path={launched}", f"--num_samples={told['num_samples']}"]
    command += [f"--output_dir={tmp_path}"]
    outcome = run_python(command)
    assert outcome.returncode == 0, outcome.stderr
    again = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert again["nll"] == pytest.approx(told["nll"], rel=1e-5)  # the same points
    assert f"nll: {again['nll']:.4f} ± {again['nll_standard_error']:.4f}" in outcome.stdout


@pytest.mark.parametrize("kind, name", [("FSDP", "FSDP, version 1"), ("DEEPSPEED", "DEEPSPEED")])
def test_ways_to_split_networks_that_are_refused(monkeypatch, kind, name):
    monkeypatch.setattr(setup.Accelerator, "distributed_type", setup.DistributedType(kind))
    with pytest.raises(ValueError, match=f"{name}.*multi_gpu.*fsdp_version 2"):
        loop.Trainer(tiny())


def test_a_likelihood_that_cannot_be_had_costs_no_model(monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("The solver cannot keep to its tolerances")

    monkeypatch.setattr(loop, "measure_likelihood", fail)
    result = train(tiny(num_likelihood_samples=20))
    assert result.likelihood is None and result.pipeline.unet is not None


def test_wandb_gets_the_same(tmp_path, monkeypatch):
    """In its offline mode; the file that `wandb sync` would send holds names and picture."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    train(tiny(output_dir=str(tmp_path / "model"), logger="wandb", logging_steps=10, validation_steps=60))
    (log,) = tmp_path.rglob("run-*.wandb")
    names, deadline = (b"loss", b"lambda/1", b"moment/0", b"samples"), time.monotonic() + 20
    while not all(name in log.read_bytes() for name in names):  # another process writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(tmp_path.rglob("media/images/samples_60_*.png"))


def test_the_command_line_refuses_politely(launched):
    outcome = run_python([SCRIPT, f"--output_dir={launched}"])
    assert outcome.returncode == 1 and "--overwrite_output_dir" in outcome.stderr and "Traceback" not in outcome.stderr
