"""Work in pieces that survive an interruption and are shared by processes: each piece is a file, made once."""

from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from ..files import write_atomically
from .processes import process_state


Make = Callable[[int, int], dict[str, Tensor]]


def make_shards(folder: Path, key: str, number: int, size: int, make: Make, description: str) -> None:
    """Make the pieces that are missing; returns on every process when all are there.

    Args:
        folder: Where the pieces are, one file for each.
        key: What all depends on. Pieces of another key are refused.
        number: Items in all pieces together.
        size: Items in a piece; the last may have fewer.
        make: `(first, last)` to tensors of the items from first to before last; it may depend on nothing else.
        description: For the progress bar.

    Raises:
        ValueError: There are pieces of another key, or a damaged one.
    """
    state = process_state()
    pieces = [(index, first, min(first + size, number)) for index, first in enumerate(range(0, number, size))]
    missing = [piece for piece in pieces if not _is_there(_file(folder, piece[0]), f"{key} {piece[1:]}")]
    state.wait_for_everyone()  # before the first is written, or they would not agree on what is missing
    mine = missing[state.process_index :: state.num_processes]
    for index, first, last in tqdm(mine, description, leave=False, disable=not state.is_main_process or not mine):
        tensors = {name: tensor.contiguous() for name, tensor in make(first, last).items()}
        content = safetensors.torch.save(tensors, metadata={"key": f"{key} {(first, last)}"})
        write_atomically(_file(folder, index), content)
    state.wait_for_everyone()


def load_shards(folder: Path, number: int, size: int, name: str) -> Tensor:
    """One tensor of all pieces, `(number, ...)`."""
    indices = range(-(-number // size))
    return torch.cat([safetensors.torch.load_file(_file(folder, index))[name] for index in indices])


def _file(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05}.safetensors"


def _is_there(path: Path, key: str) -> bool:
    if not path.exists():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("key")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it will be made anew.") from error
    if found != key:
        raise ValueError(f"{path} is of another model, other data or other settings: choose another `output_dir`.")
    return True
