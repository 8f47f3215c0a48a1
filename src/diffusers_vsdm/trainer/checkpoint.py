"""Checkpoints: a folder of tensors and numbers that is there whole or not at all.

`checkpoint-N` holds `state.safetensors` and `state.json`. It is written under a temporary name and renamed, so a
folder of that name is complete, whatever killed the process.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from diffusers.utils import logging
from torch import Tensor


logger = logging.get_logger(__name__)
PREFIX, UNFINISHED = "checkpoint-", ".unfinished-checkpoint-"
LATEST = "latest"
TENSORS, NUMBERS = "state.safetensors", "state.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(folder: Path, name: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names: `latest`, a name inside `folder`, or a path.

    None if it is `latest` and there is none yet, so that the same command starts a run and goes on with it.

    Raises:
        FileNotFoundError: There is no such checkpoint; the message lists those that there are.
    """
    present = list_checkpoints(folder)
    if name == LATEST:
        if not present:
            logger.warning("There is no checkpoint in %s yet: the run starts from the beginning.", folder)
        return present[-1] if present else None
    for path in (folder / name, Path(name)):
        if (path / NUMBERS).is_file():
            return path
    names = ", ".join(path.name for path in present) or "none"
    raise FileNotFoundError(f"`resume_from_checkpoint` {name!r} is not a checkpoint in {folder}. There are: {names}.")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], limit: int) -> Path:
    """Write `checkpoint-{step}`, then delete the oldest others beyond `limit` (0: keep all).

    Raises:
        OSError: It could not be written, for want of space perhaps; checkpoints that exist are left alone.
    """
    target, unfinished = folder / f"{PREFIX}{step}", folder / f"{UNFINISHED}{step}"
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    try:
        unfinished.mkdir(parents=True)
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished / TENSORS)
        (unfinished / NUMBERS).write_text(json.dumps(state))
        for file in unfinished.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if target.exists():
            discard(target)
        os.rename(unfinished, target)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = list_checkpoints(folder)
        raise OSError(
            f"Checkpoint {target} could not be written ({error}); the last whole one is"
            f" {kept[-1] if kept else 'none'}. Free some space, then resume."
        ) from error
    others = [path for path in list_checkpoints(folder) if path != target]
    for old in others[: max(0, len(others) + 1 - limit)] if limit else []:
        discard(old)
    return target


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, lest half of it should pass for a whole one."""
    doomed = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def inside(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, by the rest of their names."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def check_settings(path: Path, stored: dict[str, Any], settings: dict[str, Any], default: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run; a setting that is younger than it had its default.

    Raises:
        ValueError: A setting differs; the message names it.
    """
    known = default | stored
    changed = sorted(key for key in settings if key in known and known[key] != settings[key])
    if changed:
        raise ValueError(
            f"The checkpoint {path} is of a run with other settings of {', '.join(f'`{key}`' for key in changed)}:"
            " give those, or start a new run in another `output_dir`."
        )


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what [`save_checkpoint`] wrote.

    Raises:
        ValueError: The files are damaged.
    """
    try:
        # clones: tensors in the file's alignment would be rounded differently by some CPU kernels
        tensors = {key: t.clone() for key, t in safetensors.torch.load_file(path / TENSORS).items()}
        numbers = json.loads((path / NUMBERS).read_text())
        if "config" not in numbers:
            raise ValueError(f"{NUMBERS} has no settings of its run")
        return tensors, numbers
    except (safetensors.SafetensorError, ValueError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"The checkpoint {path} is damaged ({error}): resume from an older one.") from error
