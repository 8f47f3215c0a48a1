"""IDX files, the form of MNIST and of the data sets made after it.

A file holds two zero bytes, one for the type (8: unsigned bytes), one for the number of dimensions, the dimensions as
big-endian integers of 32 bits, and then the values.

References:
    LeCun, Cortes, Burges, "The MNIST database of handwritten digits": the format.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image


SPLITS = {"train": "train", "test": "t10k"}  # to the prefix of the files' names
UNSIGNED_BYTE = 8


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, plain or compressed (`.gz`).

    Args:
        path: The file.
        num_dimensions: That it must have: 1 for labels, 3 for images.

    Raises:
        ValueError: It is no such file, is cut short or damaged, or holds no values.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): fetch it again.") from error
    magic, start = bytes((0, 0, UNSIGNED_BYTE, num_dimensions)), 4 + 4 * num_dimensions
    if content[:4] != magic:
        raise ValueError(
            f"{path} starts with {content[:4].hex() or 'nothing'}, not with {magic.hex()}: it is no IDX file of"
            f" unsigned bytes in {num_dimensions} dimensions."
        )
    if len(content) < start:
        raise ValueError(f"{path} is cut short, within its header: fetch it again.")
    shape = struct.unpack(f">{num_dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape) or 0 in shape:
        raise ValueError(
            f"{path} holds {len(content) - start} values, and its header says {' x '.join(map(str, shape))}: it is cut"
            " short, damaged or empty; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@dataclass(frozen=True)
class IdxRows:
    """Images and labels as rows with the columns `image`, a picture of mode L, and `label`.

    It has as much of the face of a `datasets.Dataset` as [`load_images`] needs.

    Args:
        images: `(n, height, width)` of 8 bits.
        labels: `(n,)` of 8 bits.
    """

    images: np.ndarray
    labels: np.ndarray
    column_names: ClassVar[list[str]] = ["image", "label"]
    features: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether a folder holds images of a split."""
        return any(_find(folder, name).exists() for name in (f"{prefix}-images-idx3" for prefix in SPLITS.values()))

    @classmethod
    def read(cls, folder: Path, split: str) -> Self:
        """The `train` or the `test` split of a folder with MNIST's file names.

        Raises:
            ValueError: There is no such split, a file of it is missing or damaged, or there are not as many labels as
                images.
        """
        if split not in SPLITS:
            raise ValueError(f"`split` of IDX files must be one of {tuple(SPLITS)}, got {split!r}.")
        files = [_find(folder, f"{SPLITS[split]}-{kind}") for kind in ("images-idx3", "labels-idx1")]
        for file in files:
            if not file.exists():
                raise ValueError(f"{file.with_suffix('')}, of the split {split!r}, is missing, plain or as .gz.")
        images, labels = read_idx(files[0], 3), read_idx(files[1], 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{files[0]} holds {len(images)} images, but {files[1]} {len(labels)} labels: they are no pair."
            )
        return cls(images, labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | str) -> Any:
        """A row by its number, or one of the columns by its name."""
        if isinstance(key, str):
            return {"image": self.images, "label": self.labels}[key]
        return {"image": Image.fromarray(self.images[key]), "label": int(self.labels[key])}

    def select(self, indices: range) -> Self:
        """Some of the rows."""
        return type(self)(self.images[indices], self.labels[indices])

    def select_columns(self, name: str) -> Self:
        """These rows: no column costs anything."""
        return self


def _find(folder: Path, name: str) -> Path:
    """The plain file if it is there, else the compressed one, there or not."""
    plain = folder / f"{name}-ubyte"
    return plain if plain.exists() else plain.with_name(f"{plain.name}.gz")
