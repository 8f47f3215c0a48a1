"""The place of a process among all that run a script."""

import os

import torch
from accelerate import PartialState


# by which launchers tell a process of the others, torchrun and those of MPI
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_state() -> PartialState:
    """Accelerate's state, which is made at the first call. Processes on CPUs find each other only if it is told.

    Raises:
        ValueError: Several processes were asked for, and only this one was started.
    """
    # what `accelerate launch --cpu --num_processes 2` does; of several it leaves nothing but the port
    if os.environ.get("ACCELERATE_USE_CPU", "") in ("True", "true", "1") and "MASTER_PORT" in os.environ:
        if not any(name in os.environ for name in WORLD_SIZES):
            raise ValueError(
                "`accelerate launch --cpu` starts one process, whatever `--num_processes` says: for several use"
                " `accelerate launch --multi_gpu --num_processes N`, which on a machine without GPUs has them on the"
                " CPU, or `torchrun --nproc_per_node N`."
            )
    return PartialState(cpu=not torch.accelerator.is_available())
