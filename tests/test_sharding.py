"""FSDP2: networks that are split over processes train, stop, go on and are saved as whole ones.

Accelerate shards on accelerators only; here it is told to do so on two CPU processes, where torch's FSDP2 works too.
"""

import pytest
import torch
from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffusers_vsdm.trainer import Trainer, TrainingConfig
from diffusers_vsdm.trainer.forecast import ForecastTrainer
from diffusers_vsdm.trainer.processes import process_state
from diffusers_vsdm.trainer.sharding import is_sharded

from .processes import run_two
from .test_checkpoint import TINY
from .test_forecast_training import tiny as tiny_forecaster
from .test_forecast_training import walks


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def _shard_on_cpus():
    initialize = state.AcceleratorState.__init__

    def patched(self, *given, **named):
        initialize(self, *given, **named)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin(fsdp_version=2)

    state.AcceleratorState.__init__ = patched


def _trainers(folder, num_processes):
    """On vectors, with pictures, and on series, whose model is called in more ways than one."""
    shared = {"max_train_steps": 20, "checkpointing_steps": 10, "validation_steps": 10, "sa_stages": 3}
    vectors = TINY | shared | {"num_eval_samples": 20, "train_batch_size": 64 // num_processes}
    vectors["output_dir"] = str(folder / "unet")
    series = shared | {"num_validation_windows": 1, "train_batch_size": 8 // num_processes}
    series |= {"encoder_type": "transformer", "encoder_dropout": 0.0, "output_dir": str(folder / "model")}
    yield "unet", lambda **more: Trainer(TrainingConfig(**(vectors | more)))
    yield "model", lambda **more: ForecastTrainer(tiny_forecaster(**(series | more)), walks())


def _train_split(folder):
    torch.set_num_threads(1)
    _shard_on_cpus()
    found = {}
    for name, make in _trainers(folder, 2):
        trainer = make()
        assert is_sharded(trainer.network)
        runs = trainer.train(), make(resume_from_checkpoint="checkpoint-10").train()
        found[name] = [run.lambdas for run in runs] + [getattr(run.pipeline, name).state_dict() for run in runs]
    torch.save(found, folder / f"{process_state().process_index}.pt")


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch's FSDP2 needs a GPU")
def test_split_networks_train_as_whole_ones_do(tmp_path):
    call = f"test_sharding._train_split(Path({str(tmp_path)!r}))"
    run_two(f"from pathlib import Path\nfrom tests import test_sharding\n{call}\n", tmp_path)
    first, second = (torch.load(tmp_path / f"{index}.pt") for index in range(2))
    for name, make in _trainers(tmp_path / "whole", 1):
        assert (tmp_path / name / "validation" / "step-20.png").exists()
        state.AcceleratorState._reset_state(True)
        whole = make().train()
        lambdas, again, weights, resumed = first[name]
        assert torch.equal(lambdas, again)
        torch.testing.assert_close(lambdas, whole.lambdas, rtol=2e-4, atol=2e-4)
        for key, tensor in getattr(whole.pipeline, name).state_dict().items():
            torch.testing.assert_close(weights[key], tensor, rtol=2e-4, atol=2e-4)
            assert torch.equal(weights[key], resumed[key]) and torch.equal(weights[key], second[name][2][key])
