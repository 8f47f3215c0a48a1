"""What the configurations of Diffusers' own schedulers mean to `VSDMScheduler`."""

import inspect
from typing import Any

import diffusers
from diffusers.utils import logging


logger = logging.get_logger(__name__)

TABLES = ("beta_schedule", "trained_betas", "trained_sigmas")
# what the network was trained with, and whether it is clipped; of these `from_config` would leave out those that are
# defaults of the other class
KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "clip_sample",
)
# flags that make another process of the table, and their values where they do not
PROCESS_FLAGS = {"use_flow_sigmas": False, "snr_shift_scale": 1.0}
GRID_FLAGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr_mean"}
UNKNOWN_GRID_FLAGS = ("use_beta_sigmas", "use_lu_lambdas")


def foreign_settings(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `VSDMScheduler` that the whole configuration of another class stands for, beside equal keys.

    Args:
        config: As `from_config` takes it.
        given: The caller's own keyword arguments.

    Raises:
        ValueError: The process of that class is not one of this package.
    """
    is_whole = isinstance(config, dict) and ("_class_name" in config or "_use_default_values" in config)
    if not is_whole or "solver" in config:
        return {}
    name = config.get("_class_name", "another class")
    if all((config | given).get(key) is None for key in TABLES):
        raise ValueError(
            f"The configuration of {name} has no table of betas, and its process need not be a diffusion by"
            " one: name the table that the network was trained with, by `beta_schedule`, `trained_betas` or"
            " `trained_sigmas`."
        )
    for flag, neutral in PROCESS_FLAGS.items():
        if config.get(flag, neutral) != neutral and not given.keys() & set(TABLES):
            raise ValueError(
                f"The configuration of {name} has `{flag}={config[flag]}`, another process than that of its table of"
                " betas: pass the table that the network was trained with as `trained_betas`."
            )
    settings = {key: config[key] for key in KEPT if key in config}
    if "clip_sample" not in config and not _clips(config.get("_class_name")):
        settings["clip_sample"] = False
    for flag, grid in GRID_FLAGS.items():
        if config.get(flag):
            settings["time_grid"] = grid
    if lost := [flag for flag in UNKNOWN_GRID_FLAGS if config.get(flag)]:
        logger.warning(f"The configuration of {name} asks for {lost}, which is not known here: see `time_grid`.")
    return settings


def _clips(name: str | None) -> bool:
    """Whether a class of Diffusers clips; old files do not say so."""
    known = getattr(diffusers, name, None) if name else None
    return known is not None and "clip_sample" in inspect.signature(known).parameters
