"""Configurations of Diffusers' own schedulers: the process stays, or is refused."""

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.utils import logging

from diffusers_vsdm import VSDMScheduler


WITH_BETAS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
)
WITHOUT = (
    *("CMStochasticIterativeScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "IPNDMScheduler", "ScoreSdeVeScheduler"),
)


def configurations(name, folder):
    """As it is in memory, with its defaults marked as such, and as it is read from a file."""
    stock = getattr(diffusers, name)()
    stock.save_pretrained(folder)
    return stock, (stock.config, VSDMScheduler.load_config(folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WITH_BETAS)
def test_the_process_is_that_of_the_other_class(name, tmp_path):
    """Also where its defaults are not ours."""
    stock, found = configurations(name, tmp_path)
    for config in found:
        ours = VSDMScheduler.from_config(config)
        torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-6)
        assert ours.config["prediction_type"] == stock.config["prediction_type"]
        # a class that does not clip, does not as ours either
        assert ours.config["clip_sample"] == stock.config.get("clip_sample", False)
        assert VSDMScheduler.from_config(config, clip_sample=True).config["clip_sample"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_samples_of_an_euler_scheduler_are_kept():
    """With its own network's noise, x0 of which leaves [-1, 1]."""
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stock = EulerDiscreteScheduler(**table, timestep_spacing="trailing")
    ours = VSDMScheduler.from_config(stock.config, solver="ddim")
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    x = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    other = x * stock.init_noise_sigma
    mine = stock.scale_model_input(other, stock.timesteps[0])
    for k in stock.timesteps:
        mine = ours.step(0.3 * torch.tanh(mine), k, mine).prev_sample
        seen = stock.scale_model_input(other, k)
        other = stock.step(0.3 * torch.tanh(seen), k, other).prev_sample
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_another_kind_of_process_is_refused(name, tmp_path):
    for config in configurations(name, tmp_path)[1]:
        with pytest.raises(ValueError, match="no table of betas.*`trained_betas`"):
            VSDMScheduler.from_config(config)
        assert len(VSDMScheduler.from_config(config, trained_betas=[0.1, 0.2, 0.3])) == 3


@pytest.mark.parametrize(
    "stock", [DPMSolverMultistepScheduler(use_flow_sigmas=True), CogVideoXDDIMScheduler(snr_shift_scale=3.0)]
)
def test_flags_that_make_another_process_are_refused(stock):
    with pytest.raises(ValueError, match="use_flow_sigmas=True|snr_shift_scale=3.0"):
        VSDMScheduler.from_config(stock.config)


def test_grids_are_translated_where_they_are_known(caplog):
    for flag, grid in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "log_snr_mean")):
        stock = DPMSolverMultistepScheduler(**{flag: True})
        assert VSDMScheduler.from_config(stock.config).config["time_grid"] == grid
        assert VSDMScheduler.from_config(stock.config, time_grid="spacing").config["time_grid"] == "spacing"
    logger = logging.get_logger("diffusers_vsdm.schedulers.foreign")
    logger.addHandler(caplog.handler)
    try:
        VSDMScheduler.from_config(DPMSolverMultistepScheduler(use_lu_lambdas=True).config)
        assert "use_lu_lambdas" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_few_keys_written_by_hand_are_no_foreign_configuration():
    assert len(VSDMScheduler.from_config({"num_train_timesteps": 7})) == 7
    # and ours, that went through another class, is ours again
    ours = VSDMScheduler.from_power_law(beta_max=10.0, solver="heun", time_grid="karras")
    back = VSDMScheduler.from_config(DDIMScheduler.from_config(ours.config).config)
    assert {k: back.config[k] for k in ("solver", "time_grid", "clip_sample")} == {
        k: ours.config[k] for k in ("solver", "time_grid", "clip_sample")
    }
    torch.testing.assert_close(back.integrated_beta, ours.integrated_beta)
