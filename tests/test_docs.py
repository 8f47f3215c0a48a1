"""Code in the README, docs and model cards runs as printed, and what they say is what was recorded."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks.tables import ROOT, documents, render
from diffusers_vsdm import VSDMForecastPipeline, VSDMPipeline
from diffusers_vsdm.data.frames import rolling_windows
from diffusers_vsdm.data.series import load_series
from diffusers_vsdm.hub.cards import render_card
from diffusers_vsdm.trainer import TrainingConfig, train
from diffusers_vsdm.trainer.bridge import BridgeConfig
from diffusers_vsdm.trainer.evaluation import EvaluationConfig
from diffusers_vsdm.trainer.forecast import ForecastConfig, evaluate_forecasts
from diffusers_vsdm.trainer.report import evaluate, write_report

from .processes import run_python


CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
SHIPPED = [path for path in CARDS if (path.parent / "model_index.json").exists()]
LITTLE = {
    "max_train_steps": 8,
    "sa_stages": 2,
    "sa_trajectories": 4,
    "train_batch_size": 16,
    "num_eval_samples": 50,
    "ddpm_num_inference_steps": 2,
}
LITTLE_OF = {
    "train_vsdm": LITTLE
    | {"max_train_samples": 32, "num_train_samples": 500, "num_likelihood_samples": 0, "eval_batch_size": 2},
    "train_forecaster": LITTLE,
}


def name(path):
    return path.relative_to(ROOT).as_posix()


def run_blocks(path):
    """The code of a document, one block after the other, as a reader would run it."""
    namespace = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, str(path), "exec"), namespace)
    return namespace


def location(path):
    """Where a document loads its first model from."""
    return Path(re.search(r'from_pretrained\("(.*?)"\)', path.read_text())[1])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which the documented commands have been run, in little."""
    folder = tmp_path_factory.mktemp("workspace")
    config = TrainingConfig(
        output_dir=str(folder / "outputs" / "spiral-8y"),
        standardize=True,
        max_train_steps=50,
        sa_stages=3,
        sa_trajectories=16,
        num_train_samples=2000,
        train_batch_size=64,
        model_width=16,
        num_eval_samples=100,
    )
    config.prepare_output_dir()
    write_report(config, train(config))
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    return folder


@pytest.mark.parametrize("path", [*documents(), *SHIPPED], ids=name)
def test_code_blocks_run_as_printed(path, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    namespace = run_blocks(path)
    if path.parent == ROOT:
        assert len(namespace["samples"]) == 1000
        assert not torch.equal(namespace["drift"].lam, torch.ones(2))


@pytest.mark.parametrize("path", [ROOT / "README.md", *CARDS], ids=name)
def test_training_commands_run_as_printed(path, tmp_path, monkeypatch):
    """In little: the same flags, and then fewer steps; and a card's code, with the model that this leaves.

    The README's by the launcher itself, which takes ten seconds to no other end for each card.
    """
    (line,) = re.findall(r"^accelerate launch (.*)", path.read_text(), flags=re.MULTILINE)
    data = os.environ.get("VSDM_TEST_DATA")
    for source in ("uoft-cs/cifar10", "exchange_rate_nips"):
        if source in line and not data:
            pytest.skip(f"VSDM_TEST_DATA is not set: it names the folder that holds {source}")
    if "uoft-cs/cifar10" in line:
        (tmp_path / "uoft-cs").mkdir()
        (tmp_path / "uoft-cs" / "cifar10").symlink_to(Path(data) / "cifar10")
    if "exchange_rate_nips" in line:
        with tarfile.open(Path(data) / "timeseries" / "exchange_rate_nips.tar.gz") as archive:
            archive.extractall(tmp_path)  # `filter` is not in every Python 3.11
    (tmp_path / "training").symlink_to(ROOT / "training")
    little = LITTLE_OF[re.match(r"training/(\w+)\.py", line)[1]] | {"output_dir": location(path)}
    command = [*shlex.split(line), *(f"--{key}={value}" for key, value in little.items())]
    if path in CARDS:
        outcome = run_python(command, tmp_path)
    else:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1"]
        outcome = subprocess.run([*launcher, *command], cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert DiffusionPipeline.from_pretrained(tmp_path / location(path)).scheduler.drift is not None
    if path in CARDS:
        monkeypatch.chdir(tmp_path)
        namespace = run_blocks(path)
        if path.parent.name == "exchange":
            assert namespace["pipeline"].model.config["num_series"] == 8
        else:
            assert len(namespace["samples"]) > 0


@pytest.mark.parametrize("path", documents(), ids=name)
def test_tables_are_those_of_the_records(path):
    assert render(path.read_text()) == path.read_text(), "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("path", [*documents(), *CARDS], ids=name)
def test_local_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "script, config",
    [
        ("train_vsdm", TrainingConfig),
        ("train_sb_fbsde", BridgeConfig),
        ("train_forecaster", ForecastConfig),
        ("evaluate", EvaluationConfig),
    ],
)
def test_every_flag_in_the_docs_exists(script, config):
    known = set(config.__dataclass_fields__) | {"num_processes", "help"}
    lines = 0
    for path in [*documents(), *CARDS, ROOT / "Makefile", ROOT / "training" / f"{script}.py"]:
        for line in re.findall(rf"{script}\.py ((?:[^\n]|\\\n)*)", path.read_text()):
            assert set(re.findall(r"--(\w+)", line)) <= known, line
            lines += 1
    assert lines > 1


@pytest.mark.parametrize("path", CARDS, ids=name)
def test_cards_are_rendered_from_their_records(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = location(path)
    shutil.copytree(path.parent, folder)
    (folder / "README.md").unlink()
    render_card(folder, json.loads((folder / "metrics.json").read_text()))
    assert (folder / "README.md").read_text() == path.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_shipped_models_are_those_that_were_measured(path):
    record = json.loads((path.parent / "metrics.json").read_text())
    recorded = record["metrics"]
    if "crps_sum" in recorded:
        return forecasts_as_measured(path, record)
    pipeline = VSDMPipeline.from_pretrained(path.parent)
    measured, _ = evaluate(pipeline, record["config"]["dataset_name"], recorded["num_samples"], 99)
    assert measured["w2_standardized"] == pytest.approx(recorded["w2_standardized"], abs=2e-3)
    assert measured["straightness"] == pytest.approx(recorded["straightness"], rel=1e-2)
    assert pipeline.scheduler.drift.lam.tolist() == recorded["lambda"]


def forecasts_as_measured(path, record):
    data = os.environ.get("VSDM_TEST_DATA")
    if not data:
        pytest.skip("VSDM_TEST_DATA is not set: it names the folder that holds timeseries/")
    frame = load_series(str(Path(data) / "timeseries" / f"{record['config']['dataset_name']}.tar.gz"))
    config = ForecastConfig(**record["config"])
    windows = rolling_windows(frame, config.prediction_length, config.num_test_windows)
    pipeline = VSDMForecastPipeline.from_pretrained(path.parent)
    scores, _ = evaluate_forecasts(pipeline, windows, config)
    assert scores["crps_sum"] == pytest.approx(record["metrics"]["crps_sum"], rel=1e-2)
    assert pipeline.scheduler.drift.lam.tolist() == record["metrics"]["lambda"]
