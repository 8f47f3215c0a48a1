"""Training of forecasters: what is learned from, what is not, and what a run leaves behind."""

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import HfArgumentParser

from diffusers_vsdm import VSDMForecastPipeline
from diffusers_vsdm.data.frames import regular_frame, rolling_windows
from diffusers_vsdm.metrics.forecast import forecast_metrics
from diffusers_vsdm.models.denoisers import DENOISERS
from diffusers_vsdm.models.encoders import ENCODERS
from diffusers_vsdm.objectives import denoising_score_matching
from diffusers_vsdm.trainer import forecast
from diffusers_vsdm.trainer.checkpoint import list_checkpoints
from diffusers_vsdm.trainer.forecast import ForecastConfig, ForecastTrainer, train_forecaster
from diffusers_vsdm.trainer.forecast_report import write_forecast_report

from .processes import run_python


pytestmark = [pytest.mark.usefixtures("fresh_accelerator"), pytest.mark.filterwarnings("error::FutureWarning")]

SCRIPT = Path(__file__).parents[1] / "training" / "train_forecaster.py"
TINY = {
    "prediction_length": 4,
    "context_length": 6,
    "num_test_windows": 2,
    "num_eval_samples": 8,
    "encoder_layers": 2,
    "encoder_width": 8,
    "denoiser_layers": 2,
    "denoiser_channels": 8,
    "denoiser_width": 8,
    "max_train_steps": 15,
    "train_batch_size": 8,
    "ddpm_num_steps": 20,
    "lr_warmup_steps": 3,
    "sa_stages": 3,
    "sa_trajectories": 16,
}


def tiny(**given):
    return ForecastConfig(**({"dataset_name": "mine"} | TINY | given))


def walks(rows=80, d=3, seed=0, freq="D", gaps=()):
    """Random walks with a week in them; `gaps` are pairs of rows and columns."""
    rng = np.random.default_rng(seed)
    values = 20 + rng.standard_normal((rows, d)).cumsum(0) + np.sin(2 * np.pi * np.arange(rows) / 7)[:, None]
    for row, column in gaps:
        values[row, column] = np.nan
    index = pd.period_range("2024-01-01", periods=rows, freq=freq) if freq else pd.RangeIndex(rows)
    return pd.DataFrame(values, index, [f"s{i}" for i in range(d)])


GAPS = [(slice(10, 13), 0), (slice(40, 41), 1), (30, slice(None))]


def outcome(trainer):
    """Everything that a run computes."""
    result = trainer.train()
    return [trainer.losses, result.lambdas, *(p.detach() for p in result.pipeline.model.parameters())]


def is_same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# what is trained on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [0, 3])
def test_the_windows_of_the_evaluation_are_not_trained_on(validation):
    frame = walks()
    trainer = ForecastTrainer(tiny(num_validation_windows=validation), frame)
    kept = len(frame) - 4 * (2 + validation)
    np.testing.assert_array_equal(trainer.dataset.values, frame.to_numpy()[:kept])
    assert len(trainer.dataset) == kept - (trainer.forecaster.history_length + 4) + 1
    assert len(trainer.test_windows) == 2 and len(trainer.validation_windows) == validation
    both = [window for _, window in [*trainer.validation_windows, *trainer.test_windows]]
    pd.testing.assert_frame_equal(pd.concat(both), frame.iloc[kept:], check_freq=False)
    for history, window in trainer.test_windows:
        assert history.index[-1] + 1 == window.index[0]


def test_what_comes_later_changes_nothing_of_a_run():
    frame = walks()
    other = frame.copy()
    other.iloc[-8:] = 1e3 * np.random.default_rng(1).standard_normal((8, 3))
    assert is_same(*(outcome(ForecastTrainer(tiny(), f)) for f in (frame, other)))
    other.iloc[-9] += 1.0
    assert not is_same(*(outcome(ForecastTrainer(tiny(), f)) for f in (frame, other)))


def test_batches_are_windows_of_the_series():
    trainer = ForecastTrainer(tiny(), walks())
    values, calendar = trainer.dataset.raw([0, 17, len(trainer.dataset) - 1])
    length = trainer.forecaster.history_length + 4
    for row, start in enumerate([0, 17, len(trainer.dataset) - 1]):
        assert torch.equal(values[row], trainer.dataset.values[start : start + length])
        assert torch.equal(calendar[row], trainer.dataset.calendar[start : start + length])
    assert torch.equal(values[-1, -1], trainer.dataset.values[-1])


def test_the_model_takes_what_the_data_are():
    trainer = ForecastTrainer(tiny(), walks(240, freq="h", gaps=GAPS))
    config = trainer.forecaster.config
    assert config["freq"] == "h" and config["series_names"] == ["s0", "s1", "s2"] and config["season_length"] == 24
    assert (
        config["missing_indicators"] and not ForecastTrainer(tiny(), walks()).forecaster.config["missing_indicators"]
    )


def test_the_typical_scale_is_a_mean_over_windows():
    trainer = ForecastTrainer(tiny(differencing=1, lags=[1]), walks())
    values, _ = trainer.dataset.raw(trainer._some_windows(trainer.dataset, len(trainer.dataset), 1))
    past = values[:, : trainer.forecaster.history_length].diff(dim=1)
    torch.testing.assert_close(trainer.forecaster.typical_scale, past.abs().mean(1).mean(0).float())


def test_a_series_that_begins_late_has_the_typical_scale_of_its_known_part():
    frame = walks(d=2)
    frame["s1"] = frame["s0"]
    frame.iloc[:40, 1] = np.nan
    scale = ForecastTrainer(tiny(), frame).forecaster.typical_scale
    assert abs(float(scale[1] / scale[0]) - 1) < 0.2


@pytest.mark.parametrize(
    "settings, frame, message",
    [
        ({"num_test_windows": 18}, walks(), "8 times.*takes 13"),
        ({"num_test_windows": 40}, walks(), "too few for 40 windows"),
        ({"train_batch_size": 100}, walks(), "less than a batch"),
        ({}, walks(gaps=[(slice(0, 72), 1)]), r"\[1\]|s1"),
        ({"freq": "h"}, walks(freq="D").head(0), "frame"),
        ({}, walks().assign(s1=3.0), r"\['s1'\] never vary.*no_standardize"),
        ({"differencing": 1}, walks().assign(s2=range(80)), r"differences.*\['s2'\]"),
    ],
)
def test_data_that_do_not_do(settings, frame, message):
    with pytest.raises(ValueError, match=message):
        ForecastTrainer(tiny(**settings), frame)


# the loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_of_observed_values_alone():
    trainer = ForecastTrainer(tiny(train_batch_size=32), walks(gaps=GAPS))
    index, batch = next(trainer._batches())
    draw = trainer._draw(index, batch)
    _, z = batch
    known = ~z.flatten(0, 1).isnan()
    assert 0.5 < known.float().mean() < 1 and torch.equal(draw.observed, known.float())
    torch.testing.assert_close(
        trainer.normalizer.denormalize(draw.sample)[known], z.flatten(0, 1)[known], rtol=1e-5, atol=1e-6
    )
    assert draw.condition["inputs"].isfinite().all() and draw.sample.isfinite().all()
    output = torch.randn_like(draw.sample).requires_grad_()
    loss = denoising_score_matching(
        trainer.scheduler, output, draw.sample, draw.noise, draw.timesteps, "simple", draw.observed
    )
    a, s = trainer.scheduler.marginal_scales(draw.sample, draw.timesteps)
    by_hand = ((output - (a * draw.noise - s * draw.sample)) ** 2)[known].mean()
    torch.testing.assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss, output)
    assert (gradient[~known] == 0).all() and (gradient[known] != 0).all()


def test_the_loss_of_a_step_is_the_masked_one():
    """As the trainer calls it: a batch's loss is the mean over what is known."""
    trainer = ForecastTrainer(tiny(encoder_dropout=0.0), walks(gaps=GAPS))
    index, batch = next(trainer._batches())
    draw = trainer._draw(index, batch)
    noisy = trainer.scheduler.add_noise(draw.sample, draw.noise, draw.timesteps)
    with torch.no_grad():
        prediction = trainer._predict(trainer.network, noisy, draw.timesteps, draw.condition)
    a, s = trainer.scheduler.marginal_scales(draw.sample, draw.timesteps)
    error = (prediction - (a * draw.noise - s * draw.sample)) ** 2
    assert not draw.observed.all()
    trainer._gradient_step(trainer._batches())
    torch.testing.assert_close(trainer.losses[-1], error[draw.observed.bool()].mean())


@pytest.mark.parametrize("differencing", [0, 1])
def test_nothing_is_read_from_missing_places(differencing):
    """What is missing is 0 for the encoder, and the mean where it is noised."""
    trainer = ForecastTrainer(tiny(differencing=differencing), walks(gaps=GAPS))
    rows = list(range(0, len(trainer.dataset), 3))
    missing = trainer.dataset.raw(rows)[0].isnan()
    sample, condition, observed = trainer._examples(trainer.dataset.__getitems__(rows), None)
    assert missing.any()
    mean = trainer.normalizer.mean.expand_as(sample)
    assert torch.equal(sample[observed == 0], mean[observed == 0])
    inputs = condition["inputs"]
    reach = trainer.forecaster.units.reach
    for j, lag in enumerate(trainer.forecaster.units.lags):
        lagged = missing[:, reach - lag : missing.shape[1] - lag]
        assert (inputs[..., 3 * j : 3 * j + 3][lagged] == 0).all()
    moments = trainer._moment_batches()[0]
    assert moments.isfinite().all()


@pytest.mark.parametrize("differencing", [0, 1])
def test_a_run_with_gaps_ends_well(differencing):
    frame = walks(gaps=GAPS)
    result, trainer = train_forecaster(tiny(differencing=differencing), frame)
    assert trainer.losses.isfinite().all() and result.sa_skipped == 0
    samples = trainer._pipeline(trainer.network, trainer.scheduler)(frame, 3, num_inference_steps=4).samples
    assert np.isfinite(samples).all()


# a run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, stop",
    [
        ({}, 5),
        ({}, 13),  # after the freezing of lambda
        ({"encoder_dropout": 0.0}, 5),
        ({"encoder_type": "transformer"}, 5),
        ({"gradient_accumulation_steps": 2, "use_ema": False, "encoder_dropout": 0.0}, 5),
        ({"gaps": True, "differencing": 1, "lambda_varies": True, "zeta": 1.0, "encoder_dropout": 0.0}, 5),
        ({"basis": "dense", "encoder_dropout": 0.0}, 5),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_exactly(tmp_path, settings, stop):
    settings = dict(settings)
    frame = walks(gaps=GAPS if settings.pop("gaps", False) else ())
    whole = outcome(ForecastTrainer(tiny(output_dir=str(tmp_path / "whole"), **settings), frame))
    config = tiny(output_dir=str(tmp_path / "parts"), checkpointing_steps=stop, **settings)
    first = ForecastTrainer(config, frame)
    first.save = lambda: (ForecastTrainer.save(first), _interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == [f"checkpoint-{stop}"]
    again = ForecastTrainer(dataclasses.replace(config, checkpointing_steps=0, resume_from_checkpoint="latest"), frame)
    torch.manual_seed(123)  # a new process has another state
    assert again.step == stop and is_same(whole, outcome(again))


def _interrupt():
    raise KeyboardInterrupt


def test_an_evaluation_on_the_way_leaves_the_run_as_it_is(tmp_path):
    given = {"num_validation_windows": 1, "output_dir": str(tmp_path)}
    runs = [outcome(ForecastTrainer(tiny(**given, **more), walks())) for more in ({}, {"validation_steps": 5})]
    assert is_same(*runs)
    names = {f"step-{step}.{kind}" for step in (5, 10, 15) for kind in ("json", "png")}
    assert {path.name for path in (tmp_path / "validation").iterdir()} == names


def test_processes_draw_what_one_draws():
    """Each for the whole batch, of which it keeps its part."""
    run = ForecastTrainer(tiny(), walks(gaps=GAPS))
    batch = run.dataset.__getitems__(list(range(8)))
    whole, parts = run._draw(3, batch), []
    for i in range(2):
        part = tuple(x[4 * i : 4 * i + 4] for x in batch)
        run.accelerator = type(
            "Accelerator", (), {"num_processes": 2, "process_index": i, "device": torch.device("cpu")}
        )
        parts.append(run._draw(3, part))
    for name in ("sample", "noise", "timesteps", "observed"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([part.condition["inputs"] for part in parts]), whole.condition["inputs"])
    assert 1 < len(whole.timesteps.unique())


def test_lambda_is_learned_and_that_of_the_baseline_is_not():
    result, trainer = train_forecaster(tiny(), walks())
    assert result.lambdas.shape == (4, 3) and (result.lambdas[0] == 1).all()
    assert ((result.lambdas[-1] - 1).abs() > 1e-3).all() and result.sa_skipped == 0
    assert torch.equal(result.pipeline.scheduler.drift.lam, trainer.drift.lam)
    assert not (trainer.drift.lam == 1).any()
    result, trainer = train_forecaster(tiny(baseline="sgm"), walks())
    assert (result.lambdas == 1).all() and (trainer.drift.lam == 1).all()


def test_a_dense_drift_turns_to_a_correlated_pair():
    rng = np.random.default_rng(0)
    common = rng.standard_normal((200, 1))
    frame = pd.DataFrame(10 + common + 0.2 * rng.standard_normal((200, 2)))
    config = tiny(basis="dense", scaling="none", max_train_steps=40, sa_stages=10, prior_type="marginal")
    result, trainer = train_forecaster(config, frame)
    assert trainer.drift.turns and result.sa_skipped == 0
    axes = trainer.drift.basis(dtype=torch.float64).to_basis(torch.eye(2, dtype=torch.float64))
    assert trainer.drift.data_covariance[0, 1].abs() > 0 and (trainer.drift.matrix - torch.eye(2)).abs().max() > 1e-3
    torch.testing.assert_close(axes @ axes.T, torch.eye(2, dtype=torch.float64))
    samples = result.pipeline(frame, 5, num_inference_steps=4).samples
    assert samples.shape == (5, 4, 2) and np.isfinite(samples).all()


def test_a_dense_drift_and_missing_values_are_refused_at_once():
    """Not at the first step, after the data are read and a folder is made."""
    with pytest.raises(ValueError, match="missing"):
        ForecastTrainer(tiny(basis="dense"), walks(gaps=GAPS))


@pytest.mark.parametrize("settings", [{"sa_update": "ipf", "zeta": 1.0}, {"ddpm_beta_schedule": "ve"}, {"lags": [5]}])
def test_other_algorithms_run(settings):
    result, _ = train_forecaster(tiny(**settings), walks(freq=None))
    assert np.isfinite(result.final_loss)
    assert np.isfinite(result.pipeline(walks(freq=None), 2, num_inference_steps=4).samples).all()


@pytest.mark.parametrize("freq", ["B", "M", None])
def test_runs_of_other_clocks(freq):
    frame = walks(freq=None)
    if freq is not None:
        frame = frame.set_axis(pd.date_range("2010-01-01", periods=len(frame), freq={"M": "ME"}.get(freq, freq)))
    result, trainer = train_forecaster(tiny(max_train_steps=6, sa_stages=1), frame)
    history, window = trainer.test_windows[0]
    assert result.pipeline(history, 2, num_inference_steps=4).index.equals(window.index)


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dataset_name": ""}, "`dataset_name` or `train_data_dir`"),
        ({"prediction_length": 0}, "`prediction_length`"),
        ({"context_length": -1}, "`context_length`"),
        ({"differencing": -1}, "`differencing`"),
        ({"num_test_windows": -1}, "`num_test_windows`"),
        ({"num_eval_samples": 0}, "`num_eval_samples`"),
        ({"lags": [1, 0]}, "`lags`"),
        ({"validation_steps": 5}, "`validation_steps`.*`num_validation_windows`"),
        ({"basis": "dct"}, "`basis` 'dct'"),
        ({"lambda_per": "channel"}, "`lambda_per`"),
        ({"encoder_dropout": 1.0}, "`encoder_dropout`"),
        ({"input_dropout": -0.1}, "`input_dropout`"),
        ({"scaling": "most"}, "`scaling`.*'most'"),
        ({"encoder_type": "gru"}, "`encoder_type`.*'gru'"),
        ({"denoiser_type": "mlp"}, "`denoiser_type`.*'mlp'"),
        ({"irregular": "drop"}, "`irregular`.*'drop'"),
        ({"sa_stages": 15}, "`sa_stages`"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lags": [1, 7, 14], "columns": ["a b", "c"], "standardize": False, "encoder_type": "transformer"},
        {"train_data_dir": "some.csv", "dataset_name": "", "freq": "15min", "differencing": 2, "use_ema": False},
    ],
)
def test_a_stated_command_is_read_as_the_same_settings(settings):
    config = tiny(output_dir="elsewhere", **settings)
    launch, run, script, *flags = shlex.split(config.command())
    assert (launch, run, script) == ("accelerate", "launch", "training/train_forecaster.py")
    (again,) = HfArgumentParser(ForecastConfig).parse_args_into_dataclasses(flags)
    assert again == dataclasses.replace(config, output_dir=again.output_dir)


# a report ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A run of the command line, on a file with business days."""
    folder = tmp_path_factory.mktemp("launched")
    frame = walks(80, freq=None)
    frame.index = pd.bdate_range("2024-01-01", periods=80, name="date")
    frame.to_csv(folder / "walks.csv")
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    command = [
        SCRIPT,
        f"--train_data_dir={folder / 'walks.csv'}",
        f"--output_dir={folder / 'model'}",
        "--lags",
        "1",
        "5",
    ]
    command += [*flags, "--differencing=1", "--num_validation_windows=1", "--validation_steps=10"]
    found = run_python(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert found.returncode == 0, found.stderr
    return folder / "model", frame, found


def test_the_command_line_leaves_a_whole_model(launched):
    folder, frame, found = launched
    present = {path.name for path in folder.iterdir()}
    expected = {"model", "scheduler", "normalizer", "model_index.json", "metrics.json", "forecast.png", "drift.png"}
    assert present == expected | {"README.md", "pipeline.py", "validation"}
    assert "FutureWarning" not in found.stderr and "Traceback" not in found.stderr
    pipe = VSDMForecastPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(frame, 3, num_inference_steps=4)
    assert output.samples.shape == (3, 4, 3) and output.names == ["s0", "s1", "s2"]
    assert str(output.index[0]) == str((frame.index[-1] + pd.offsets.BDay(1)).date())


def test_the_scores_of_a_run_are_those_of_its_model(launched):
    folder, frame, _ = launched
    record = json.loads((folder / "metrics.json").read_text())
    pipe = VSDMForecastPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    windows = rolling_windows(regular_frame(frame, "B"), 4, 2)
    generator = torch.Generator().manual_seed(forecast.EVALUATION_SEED)
    samples = pipe([h for h, _ in windows], 8, num_inference_steps=20, generator=generator).samples
    for name, value in forecast_metrics(samples, [w for _, w in windows]).items():
        assert record["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert record["metrics"]["num_windows"] == 2 and record["metrics"]["num_series"] == 3


def test_the_command_of_a_run_is_read_as_its_settings(launched):
    folder, _, _ = launched
    record = json.loads((folder / "metrics.json").read_text())
    flags = shlex.split(record["command"])[3:]
    (again,) = HfArgumentParser(ForecastConfig).parse_args_into_dataclasses(flags)
    assert {key: getattr(again, key) for key in record["config"]} == record["config"]
    assert again.lags == [1, 5] and again.train_data_dir == "walks.csv" and again.differencing == 1


def test_the_card_says_what_the_model_does(launched):
    folder, _, _ = launched
    card, record = (folder / "README.md").read_text(), json.loads((folder / "metrics.json").read_text())
    assert "{{" not in card and "{%" not in card and str(folder.parent) not in card
    for said in ("VSDMForecastPipeline", "forecast.png", "3 series", f"{record['metrics']['crps_sum']:.4f}"):
        assert said in card, said
    assert f"at least {record['metrics']['history_length']} times" in card


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_data_dir=nowhere.csv"], "nowhere.csv"),
        ([], "`dataset_name` or `train_data_dir`"),
        (["--train_data_dir=nowhere.csv", "--prediction_length=0"], "`prediction_length`"),
    ],
)
def test_the_command_line_says_what_is_wrong(monkeypatch, tmp_path, flags, message):
    import runpy

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--output_dir={tmp_path / 'model'}", *flags])
    with pytest.raises(SystemExit, match=f"train_forecaster.py: .*{message}"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_report_without_an_evaluation(tmp_path):
    result, trainer = train_forecaster(tiny(output_dir=str(tmp_path), num_test_windows=0), walks())
    record = write_forecast_report(trainer, result)
    assert "crps_sum" not in record["metrics"] and not (tmp_path / "forecast.png").exists()
    assert "not measured" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("silent, windows", [(slice(60, None), 0), (slice(60, 93), 1)])
def test_a_series_that_is_silent_before_a_window_costs_its_score_alone(tmp_path, silent, windows):
    """As with shops that close: nothing is known of it when the forecast is made."""
    frame = walks(rows=100, gaps=[(silent, 1)])
    config = tiny(
        output_dir=str(tmp_path), num_test_windows=1 + windows, num_validation_windows=1, validation_steps=10
    )
    result, trainer = train_forecaster(config, frame)
    record = write_forecast_report(trainer, result)
    assert record["metrics"]["num_windows"] == windows and (tmp_path / "README.md").exists()
    assert ("crps_sum" in record["metrics"]) == bool(windows) == (tmp_path / "forecast.png").exists()
    assert json.loads((tmp_path / "validation" / "step-10.json").read_text())["num_windows"] in (0, 1)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_every_weight_that_is_trained_has_a_gradient(encoder, denoiser):
    """Or else data parallelism waits for it."""
    trainer = ForecastTrainer(tiny(encoder_type=encoder, denoiser_type=denoiser), walks())
    batches = trainer._batches()
    trainer._gradient_step(batches)  # the last layer is zero at first
    trainer.prepared_optimizer.zero_grad = lambda: None
    trainer._gradient_step(batches)
    missing = [n for n, p in trainer.network.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_values_without_a_scale_are_not_cut():
    """Around 50, where a bound of ten would leave nothing of them."""
    trainer = ForecastTrainer(tiny(scaling="none"), 2.5 * walks())
    assert (trainer.forecaster.typical_scale > 30).all()
    _, z = trainer.dataset.__getitems__([0, 5])
    values, _ = trainer.dataset.raw([0, 5])
    torch.testing.assert_close(z, values[:, trainer.forecaster.units.reach :].float())


def test_moments_of_parts_are_those_of_the_whole(monkeypatch):
    whole = ForecastTrainer(tiny(), walks())
    monkeypatch.setattr(forecast, "MOMENT_VALUES", 5 * whole.dataset.length * 3)
    parts = ForecastTrainer(tiny(), walks())
    assert len(list(parts._moment_batches())) > 5
    assert torch.equal(whole.forecaster.typical_scale, parts.forecaster.typical_scale)
    for name in ("mean", "std"):
        torch.testing.assert_close(getattr(whole.normalizer, name), getattr(parts.normalizer, name))


def test_a_report_of_windows_with_missing_values(tmp_path):
    """After hours of training: such windows have no score, but the rest of the report is there."""
    frame = walks(gaps=[(75, 1)])  # in the second of the two windows
    result, trainer = train_forecaster(tiny(output_dir=str(tmp_path)), frame)
    write_forecast_report(trainer, result)
    assert (tmp_path / "metrics.json").exists() and (tmp_path / "README.md").exists()


# what is learned -----------------------------------------------------------------------------------------------------


def test_a_season_with_noise_is_learned():
    """Better than the last value with changes of the past, and than a season ago with such; near what can be known."""
    rng, time = np.random.default_rng(0), np.arange(400)
    season = np.stack([np.sin(2 * np.pi * time / 8), np.cos(2 * np.pi * time / 8)], axis=1)
    season = 5 + season @ np.array([[2.0, 1.0], [0.5, 2.0]])
    values = season + 0.3 * rng.standard_normal((400, 2))
    config = tiny(
        **{"prediction_length": 8, "context_length": 8, "num_test_windows": 6, "num_eval_samples": 50},
        **{"lags": [1, 8], "season_length": 8, "encoder_layers": 1, "encoder_width": 16},
        **{"denoiser_layers": 4, "denoiser_width": 16, "ddpm_num_steps": 50},
        **{"max_train_steps": 300, "train_batch_size": 16, "learning_rate": 5e-3, "lr_warmup_steps": 20},
        **{"sa_stages": 10, "sa_trajectories": 64},
    )
    result, trainer = train_forecaster(config, pd.DataFrame(values))
    found, _ = forecast.evaluate_forecasts(result.pipeline, trainer.test_windows, config)
    starts = [len(history) for history, _ in trainer.test_windows]
    truth = [values[start : start + 8] for start in starts]

    def naive(span):
        changes = (values[8:] - values[:-8] if span == 8 else values[4:] - values[:-4])[:300]
        drawn = [changes[rng.integers(0, 300, (50, 8))] for _ in starts]
        return [np.resize(values[s - span : s], (8, 2)) + change for s, change in zip(starts, drawn, strict=True)]

    known = [season[s : s + 8] + 0.3 * rng.standard_normal((50, 8, 2)) for s in starts]
    last, ago, floor = (forecast_metrics(paths, truth)["crps_sum"] for paths in (naive(1), naive(8), known))
    assert 0.8 * floor < found["crps_sum"] < min(0.25 * last, ago, 1.8 * floor), (found, last, ago, floor)
