import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

from diffusers_vsdm.trainer import Trainer, TrainingConfig, checkpoint
from diffusers_vsdm.trainer.checkpoint import find_checkpoint, list_checkpoints

from .processes import run_python


TINY = {
    "max_train_steps": 40,
    "sa_stages": 5,
    "sa_trajectories": 16,
    "num_train_samples": 500,  # several epochs
    "train_batch_size": 64,
    "model_width": 16,
    "model_num_blocks": 1,
    "standardize": True,
    "num_likelihood_samples": 0,
}


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def tiny(folder, **settings):
    return TrainingConfig(output_dir=str(folder), **(TINY | settings))


def outcome(config):
    """Everything that a run computes: each loss, each lambda, the weights."""
    trainer = Trainer(config)
    result = trainer.train()
    return trainer.losses, result.lambdas, [p.detach() for p in result.pipeline.unet.parameters()]


def assert_same(a, b):
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_ema": False, "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "lr_scheduler": "constant_with_warmup"},
        {"basis": "dense", "sa_step_count": "sign_changes"},
        {"lambda_varies": True, "zeta": 1.0},
        {"time_sampling": "log_snr"},
    ],
)
@pytest.mark.parametrize("stop", [7, 32, 35])  # between stages, at the freezing of lambda, after it
def test_a_resumed_run_is_the_uninterrupted_one_exactly(tmp_path, settings, stop):
    whole = outcome(tiny(tmp_path / "whole", **settings))
    trainer = Trainer(tiny(tmp_path / "parts", checkpointing_steps=stop, **settings))
    trainer.save = lambda: (Trainer.save(trainer), _interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == [f"checkpoint-{stop}"]
    assert_same(whole, outcome(tiny(tmp_path / "parts", resume_from_checkpoint="latest", **settings)))


LONG = 400  # more than ten lives get through


def _interrupt():
    raise KeyboardInterrupt


def _run_and_record(folder):
    tqdm.set_lock(threading.RLock())  # the one that forks share stays locked if its holder is killed
    torch.set_num_threads(1)
    resume = "latest" if list_checkpoints(folder) else ""
    config = tiny(
        folder, checkpointing_steps=1, checkpoints_total_limit=2, resume_from_checkpoint=resume, max_train_steps=LONG
    )
    torch.save(outcome(config), folder.parent / "outcome.pt")


def test_sigkill_at_ten_random_moments_changes_nothing(tmp_path):
    """A checkpoint after every step, so that many kills fall into the writing of one."""
    whole = outcome(tiny(tmp_path / "whole", max_train_steps=LONG))
    fork, folder, kills, torn = multiprocessing.get_context("fork"), tmp_path / "killed", 0, 0
    generator = random.Random(0)
    while not (tmp_path / "outcome.pt").exists():
        process = fork.Process(target=_run_and_record, args=(folder,))
        process.start()
        if kills < 10:
            before = _newest(folder)
            while process.is_alive() and _newest(folder) == before:
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.08))
            while kills % 2 and process.is_alive() and not _unfinished(folder):
                pass
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        torn += bool(_unfinished(folder))
    assert kills == 10 and torn  # and some of them within the writing of a checkpoint
    assert_same(whole, torch.load(tmp_path / "outcome.pt"))
    assert len(list_checkpoints(folder)) == 2


def _unfinished(folder):
    return list(folder.glob(f"{checkpoint.UNFINISHED}*"))


def _newest(folder):
    present = list_checkpoints(folder)
    return int(present[-1].name.split("-")[1]) if present else 0


def test_old_checkpoints_are_deleted_beyond_the_limit(tmp_path):
    Trainer(tiny(tmp_path, checkpointing_steps=10, checkpoints_total_limit=2)).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-30", "checkpoint-40"]


@pytest.mark.parametrize("again", [False, True])
def test_a_deletion_that_is_broken_off_leaves_no_half_checkpoint(tmp_path, monkeypatch, again):
    """Of an old checkpoint beyond the limit, or of one that is written again."""
    trainer = Trainer(tiny(tmp_path, checkpointing_steps=40))
    trainer.train()
    trainer.step, trainer.config.checkpoints_total_limit = (40, 0) if again else (41, 1)

    def broken_off(path, **kwargs):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", broken_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    for path in list_checkpoints(tmp_path):
        checkpoint.load_checkpoint(path)
    assert any(tmp_path.glob(".unfinished-*"))


def test_only_safetensors_and_json_are_written(tmp_path):
    Trainer(tiny(tmp_path, checkpointing_steps=20)).train()
    assert {path.name for path in (tmp_path / "checkpoint-20").iterdir()} == {"state.safetensors", "state.json"}


def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path):
    trainer = Trainer(tiny(tmp_path, checkpointing_steps=10))
    free, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        """With no room for the second checkpoint."""
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free if trainer.step == 10 else 1000, hard))
            Trainer.save(trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))

    trainer.save = save
    with pytest.raises(OSError, match="checkpoint-20 could not be written.*File too large.*checkpoint-10"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Trainer(tiny(tmp_path, checkpointing_steps=20)).train()
    with pytest.raises(ValueError, match="other settings of `learning_rate`, `zeta`"):
        Trainer(tiny(tmp_path, zeta=0.9, learning_rate=1e-4, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="other settings of `num_examples`"):
        Trainer(tiny(tmp_path, resume_from_checkpoint="latest"), torch.randn(300, 2))
    # what does not touch the numbers may change
    Trainer(tiny(tmp_path, logging_steps=7, dataloader_num_workers=1, resume_from_checkpoint="checkpoint-20"))


def test_the_latest_of_no_checkpoints_is_the_beginning(tmp_path):
    """The same command starts a run and goes on with it, as jobs that are started anew after a preemption need."""
    config = tiny(tmp_path, resume_from_checkpoint="latest", checkpointing_steps=20)
    assert_same(outcome(config), outcome(tiny(tmp_path / "other")))
    assert Trainer(config).step == 40


def test_a_new_run_is_not_crowded_out_by_the_checkpoints_of_another(tmp_path):
    old = Trainer(tiny(tmp_path, checkpointing_steps=10, max_train_steps=30))
    old.train()
    # resumed from an older one: what was just written stays
    config = tiny(tmp_path, checkpointing_steps=7, checkpoints_total_limit=2, max_train_steps=30)
    Trainer(dataclasses.replace(config, resume_from_checkpoint="checkpoint-10")).train()
    assert {path.name for path in list_checkpoints(tmp_path)} == {"checkpoint-28", "checkpoint-30"}
    with pytest.raises(FileExistsError, match="overwrite"):
        config.prepare_output_dir()
    dataclasses.replace(config, resume_from_checkpoint="latest").prepare_output_dir()
    with pytest.raises(ValueError, match="less than a batch"):
        Trainer(dataclasses.replace(config, overwrite_output_dir=True, num_train_samples=10))
    assert len(list_checkpoints(tmp_path)) == 2  # a run that cannot begin replaces none
    Trainer(dataclasses.replace(config, overwrite_output_dir=True, checkpointing_steps=0)).train()
    assert not list_checkpoints(tmp_path)


def test_a_setting_that_is_younger_than_a_checkpoint_had_its_default(tmp_path):
    Trainer(tiny(tmp_path, checkpointing_steps=20)).train()
    path = tmp_path / "checkpoint-20" / "state.json"
    numbers = json.loads(path.read_text())
    del numbers["config"]["sigma_max"]
    path.write_text(json.dumps(numbers))
    assert Trainer(tiny(tmp_path, resume_from_checkpoint="checkpoint-20")).step == 20
    with pytest.raises(ValueError, match="other settings of `sigma_max`"):
        Trainer(tiny(tmp_path, sigma_max=10.0, resume_from_checkpoint="checkpoint-20"))


def test_damaged_or_missing_checkpoints_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are: none"):
        find_checkpoint(tmp_path, "checkpoint-20")
    Trainer(tiny(tmp_path, checkpointing_steps=20)).train()
    with pytest.raises(FileNotFoundError, match="There are: checkpoint-20, checkpoint-40"):
        find_checkpoint(tmp_path, "checkpoint-30")
    file = tmp_path / "checkpoint-40" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        Trainer(tiny(tmp_path, resume_from_checkpoint="latest"))
    Trainer(tiny(tmp_path, resume_from_checkpoint="checkpoint-20"))


def test_accumulation_counts_one_step_of_the_schedule(tmp_path):
    """Three batches to a step or one: the schedule and the stages count the steps."""
    for n in (1, 3):
        AcceleratorState._reset_state(True)
        trainer = Trainer(tiny(tmp_path, gradient_accumulation_steps=n))
        result = trainer.train()
        assert trainer.lr_scheduler.state_dict()["last_epoch"] == 40 and len(result.lambdas) == 6
        assert trainer.optimizer.state_dict()["state"][0]["step"] == 40


def _two_processes(folder, batch_size, stage_only):
    torch.set_num_threads(1)
    config = tiny(folder, train_batch_size=batch_size)
    trainer = Trainer(config)
    if stage_only:
        output = trainer._stage(trainer.approximation)
        result = [output.lam, output.score_x]
    else:
        result = [trainer.train().lambdas, *(p.detach() for p in trainer.network.parameters())]
    name = f"{trainer.accelerator.num_processes}-{trainer.accelerator.process_index}.json"
    (folder / name).write_text(json.dumps([tensor.double().flatten().tolist() for tensor in result]))


@pytest.mark.parametrize("stage_only, tolerance", [(True, 1e-6), (False, 2e-4)])
def test_two_processes_compute_what_one_does(tmp_path, stage_only, tolerance):
    _two_processes(tmp_path, 64, stage_only)
    AcceleratorState._reset_state(True)
    # from a process without threads of its own: a fork of this one may wait for them for ever
    code = (
        "from pathlib import Path; from accelerate import debug_launcher; from tests import test_checkpoint as t;"
        f" debug_launcher(t._two_processes, (Path({str(tmp_path)!r}), 32, {stage_only}), num_processes=2)"
    )
    run_python(["-c", code]).check_returncode()
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second  # without a broadcast
    for a, b in zip(one, first, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=tolerance)
