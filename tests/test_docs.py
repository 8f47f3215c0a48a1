"""The README's code runs as printed, and the tables are those of the records."""

import re

import pytest
import torch

from benchmarks.tables import ROOT, documents, render
from diffusers_vsdm.trainer import TrainingConfig, train
from diffusers_vsdm.trainer.report import write_report


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


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
    return folder


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_code_blocks_run_as_printed(path, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    namespace = {"__name__": "__main__"}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), namespace)  # one after the other, as a reader would
    if path.name == "README.md":
        assert len(namespace["samples"]) == 1000
        assert not torch.equal(namespace["drift"].lam, torch.ones(2))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_tables_are_those_of_the_records(path):
    assert render(path.read_text()) == path.read_text(), "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_local_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_flag_in_the_docs_exists():
    known = set(TrainingConfig.__dataclass_fields__) | {"num_processes", "help"}
    for path in [*documents(), ROOT / "Makefile"]:
        for line in re.findall(r"train_vsdm\.py((?:[^\n]|\\\n)*)", path.read_text()):
            assert set(re.findall(r"--(\w+)", line)) <= known, line
