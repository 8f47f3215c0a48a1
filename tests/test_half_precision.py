"""Training in float16, with a CPU as the device that has it."""

import pytest
import torch
from accelerate import Accelerator

from diffusers_vsdm.trainer import Trainer, TrainingConfig, setup


TINY = {
    "dataset_name": "gaussian",
    "max_train_steps": 60,
    "sa_stages": 3,
    "sa_trajectories": 16,
    "num_train_samples": 500,
    "train_batch_size": 64,
    "model_width": 16,
    "model_num_blocks": 1,
    "standardize": True,
    "num_likelihood_samples": 0,
}
LARGEST_SCALE = 2.0**40

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class HalfPrecisionCPU(Accelerator):
    """As Accelerate is on a GPU: PyTorch's CPU can autocast to float16 and scale losses too."""

    def __init__(self, mixed_precision, **settings):
        super().__init__(**settings)
        self.state._mixed_precision = mixed_precision or "no"
        if mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=LARGEST_SCALE, growth_interval=10)


@pytest.fixture(autouse=True)
def half_precision_cpu(monkeypatch):
    monkeypatch.setattr(setup, "Accelerator", HalfPrecisionCPU)


def trainer(folder, **settings):
    return Trainer(TrainingConfig(**(TINY | {"output_dir": str(folder), "mixed_precision": "fp16"} | settings)))


def weights(trained):
    return [p.detach().clone() for p in trained.network.parameters()]


def test_gradients_that_overflow_are_skipped_and_the_others_train(tmp_path):
    run = trainer(tmp_path)
    scale, step, kinds, skipped, start = run.accelerator.scaler, run._gradient_step, set(), [], weights(run)
    linear = next(m for m in run.network.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))

    def record(batches):
        before, old = scale.get_scale(), weights(run)
        step(batches)
        same = all(torch.equal(a, b) for a, b in zip(old, weights(run), strict=True))
        skipped.append(scale.get_scale() < before)
        assert same == skipped[-1]

    run._gradient_step = record
    result = run.train()
    assert kinds == {torch.float16}
    assert 10 < sum(skipped) < 40 and skipped[0] and not all(skipped[-10:])
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(run), strict=True) if a.ndim > 1)
    assert torch.isfinite(result.lambdas).all()
    plain = trainer(tmp_path / "plain", mixed_precision="no").train()
    assert abs(result.final_loss / plain.final_loss - 1) < 0.05


@pytest.mark.parametrize("stop", [12, 47])  # while the scale falls, and after it has risen again
def test_a_resumed_run_is_the_uninterrupted_one_exactly(tmp_path, stop):
    whole, first = trainer(tmp_path / "whole"), trainer(tmp_path / "parts", checkpointing_steps=stop)
    whole.train()
    save = first.save

    def interrupted():
        save()
        raise KeyboardInterrupt

    first.save = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "parts", resume_from_checkpoint="latest")
    assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    second.train()
    assert torch.equal(second.losses, whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))
    assert second.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale()
