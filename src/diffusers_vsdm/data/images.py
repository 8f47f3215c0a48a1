"""Images from the Hub or from a folder, as tensors in [-1, 1].

A name on the Hub and a local folder, of parquet files or of images, go the same way, through the `datasets` library;
folders of IDX files (MNIST) are read by [`data.idx`].
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .idx import IdxRows


# the columns that image data sets on the Hub use, first come, first served
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
TABLES = (".parquet", ".arrow", ".tar")  # files that hold images
DECODED_AT_ONCE = 1000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST = 255  # of 8 bits


class DamagedImageError(ValueError):
    """An image that cannot be used; the message names it.

    A `DataLoader` raises the error of its worker anew, with the whole traceback in the message: its last line is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n"))


class ImageDataset(Dataset):
    """Images decoded on access, resized and cropped to one shape.

    Args:
        rows: A `datasets.Dataset`, or any sequence of dictionaries.
        column (`str`): The column that holds the images: PIL images, or arrays `(H, W)` or `(H, W, C)` of whole
            numbers from 0 to 255.
        channels (`int`): Channels C. PIL images of 8 or 16 bits are converted for 1, 3 and 4; arrays must
            have as many.
        resolution (`int`, *optional*): Height and width: the shorter side is resized to it, the longer one cropped
            about its centre. Defaults to the size of the first image, which the others must then have too.
        labels (`Tensor`, *optional*): The classes of the images, `(len(rows),)` whole numbers from 0 up.
        num_classes (`int`, *optional*): How many classes there are, where there are labels.

    Attributes:
        event_shape: `(C, H, W)`.
        labels, num_classes: As given.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        channels: int = 3,
        resolution: int | None = None,
        labels: Tensor | None = None,
        num_classes: int | None = None,
    ):
        self.rows, self.column, self.channels, self.resolution = rows, column, channels, resolution
        self.labels, self.num_classes = labels, num_classes
        self.event_shape: tuple[int, ...] = ()
        self.event_shape = tuple(self[0].shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """One image, `(C, H, W)` in [-1, 1].

        Raises:
            DamagedImageError: It cannot be decoded, or its size or number of channels is not that of the others.
        """
        try:
            array = self._array(self.rows[index][self.column])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's, of damaged files
            raise DamagedImageError(f"{self._name(index)} is damaged ({error}): remove it.") from error
        except _Mismatch as error:
            raise DamagedImageError(f"{self._name(index)} {error}") from error
        if self.event_shape and array.shape[-2:] != self.event_shape[-2:]:
            raise DamagedImageError(
                f"{self._name(index)} is {array.shape[1]} x {array.shape[2]}, others are {self.event_shape[1]} x"
                f" {self.event_shape[2]}: give a `resolution` to resize them to."
            )
        return torch.from_numpy(array).float() / 127.5 - 1

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Several images, `(n, C, H, W)`."""
        return torch.stack([self[index] for index in indices])

    def _name(self, index: int) -> str:
        """Of an image, for messages: its row, and its file where there is one."""
        name = f"Image {index} of column {self.column!r}"
        feature: Any = getattr(self.rows, "features", {}).get(self.column)
        if not _is_picture(feature):
            return name
        path = self.rows.cast_column(self.column, replace(feature, decode=False))[index][self.column]["path"]
        return f"{name} ({path})" if path else name

    def _array(self, image: Any) -> np.ndarray:
        """8-bit array `(C, H, W)` of a column's entry."""
        if image is None:
            raise _Mismatch("is missing: take its row out.")
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            array = array[:, :, None] if array.ndim == 2 else array
            is_whole = array.dtype.kind in "iu" and array.size and 0 <= array.min() and array.max() <= MOST
            if array.ndim != 3 or not is_whole or array.shape[2] != self.channels:
                raise _Mismatch(
                    f"is an array {array.shape} of {array.dtype}: (height, width, {self.channels}) of whole numbers"
                    f" from 0 to {MOST} is needed."
                )
            if self.resolution and array.shape[:2] != (self.resolution, self.resolution):
                raise _Mismatch(f"is an array of {array.shape[0]} x {array.shape[1]}: only pictures are resized.")
            return np.ascontiguousarray(array.transpose(2, 0, 1).astype(np.uint8))
        if self.channels not in MODES:
            raise _Mismatch(f"is a picture, which has {' or '.join(map(str, MODES))} channels, not {self.channels}.")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise _Mismatch(f"is a picture of mode {image.mode!r}, whose range is not known: 8 or 16 bits are needed.")
        image = image.convert(MODES[self.channels])
        if self.resolution:
            scale = self.resolution / min(image.size)
            width, height = (max(self.resolution, round(side * scale)) for side in image.size)
            image = (
                image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)
            )
            left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
            image = image.crop((left, top, left + self.resolution, top + self.resolution))
        array = np.array(image)
        return np.ascontiguousarray(np.atleast_3d(array).transpose(2, 0, 1))


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as whole numbers 0 to 255, those that [`ImageDataset`] made them of."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


class DecodedImages(Dataset):
    """The same images, decoded once and kept as bytes on a device.

    Args:
        images ([`ImageDataset`]): The images.
        device (`torch.device`): Where to keep them.
    """

    def __init__(self, images: ImageDataset, device: torch.device):
        self.event_shape, self.labels, self.num_classes = images.event_shape, images.labels, images.num_classes
        self.data = torch.empty((len(images), *self.event_shape), dtype=torch.uint8, device=device)
        for start in range(0, len(images), DECODED_AT_ONCE):
            batch = images.__getitems__(list(range(start, min(start + DECODED_AT_ONCE, len(images)))))
            self.data[start : start + len(batch)] = as_bytes(batch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Several images, `(n, C, H, W)`, on the device."""
        return self.data[torch.as_tensor(indices, device=self.data.device)].float() / 127.5 - 1


class _Mismatch(Exception):
    """An image that is not as the others."""


def load_images(
    name_or_folder: str,
    column: str | None = None,
    channels: int = 3,
    resolution: int | None = None,
    max_samples: int | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
    split: str = "train",
    label_column: str | None = None,
) -> ImageDataset:
    """A split of an image data set.

    Args:
        name_or_folder (`str`): A name on the Hub, or a folder of parquet files, of images, or of IDX files with
            MNIST's names.
        column (`str`, *optional*): The column with the images. Defaults to one of [`IMAGE_COLUMNS`] that is there.
        channels, resolution: See [`ImageDataset`].
        max_samples (`int`, *optional*): Take only so many, the first.
        config_name (`str`, *optional*): Configuration of a data set on the Hub.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it downloads.
        split (`str`, defaults to `"train"`): Its name; `train` or `test` of IDX files.
        label_column (`str`, *optional*): The column with the classes. Defaults to no labels.

    Raises:
        ValueError: There is no such data set, split or column, with the message listing what there is; or the labels
            are not whole numbers from 0 up.
    """
    if Path(name_or_folder).is_file():
        raise ValueError(f"{name_or_folder!r} is a file: give the folder that holds the images or parquet files.")
    rows: Any
    if IdxRows.are_in(Path(name_or_folder)):
        rows = IdxRows.read(Path(name_or_folder), split)
    else:
        rows = _load_rows(name_or_folder, config_name, split, cache_dir)
    known = [c for c in rows.column_names if c in ((column,) if column else IMAGE_COLUMNS)]
    if not known:
        wanted = f"{column!r} is not" if column else "is not given, and none of the usual ones is"
        raise ValueError(
            f"`image_column` {wanted} among the columns of {name_or_folder!r}: {rows.column_names}. Name one of them."
        )
    labels, num_classes = (None, None) if label_column is None else _read_labels(rows, label_column, name_or_folder)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
        labels = None if labels is None else labels[: len(rows)]
    rows = rows.select_columns(known[0])
    if known[0] in rows.features and not _is_picture(rows.features[known[0]]):
        rows = rows.with_format("numpy")  # instead of lists of lists
    return ImageDataset(rows, known[0], channels, resolution, labels, num_classes)


def _load_rows(name_or_folder: str, config_name: str | None, split: str, cache_dir: str | None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    # what `datasets` itself would take a folder of pictures with captions for is chance
    builder = {"path": "imagefolder", "data_dir": name_or_folder} if _holds_pictures(Path(name_or_folder)) else None
    try:
        return load_dataset(
            **(builder or {"path": name_or_folder}), name=config_name, split=split, cache_dir=cache_dir
        )
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The data set {name_or_folder!r} could not be loaded ({error}): give a name on the Hub, or a folder of"
            " images or parquet files that exists."
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"The files of the data set {name_or_folder!r} could not be read ({error.__cause__ or error}): one of them"
            " is damaged; take it out, or get it again."
        ) from error


def _is_picture(feature: Any) -> bool:
    """Whether it is the feature of a column of pictures, which are decoded on access."""
    from datasets import Image as Picture

    return isinstance(feature, Picture)


def _holds_pictures(folder: Path) -> bool:
    """Whether it is a folder of single images."""
    suffixes = {path.suffix.lower() for path in folder.rglob("*")} if folder.is_dir() else set()
    return bool(suffixes & set(Image.registered_extensions())) and not suffixes & set(TABLES)


def _read_labels(rows: Any, column: str, name: str) -> tuple[Tensor, int]:
    """All labels, `(n,)`, and the number of classes: as declared, else one more than the largest label."""
    if column not in rows.column_names:
        raise ValueError(
            f"`label_column` {column!r} is not among the columns of {name!r}: {rows.column_names}. Name one of them."
        )
    first = rows[0][column]
    labels = np.asarray(rows[column][:] if isinstance(first, int) else [first])
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"`label_column` {column!r} of {name!r} must hold a whole number for each image, got {first!r} in row 0"
            f" and {labels.dtype} as the type of all."
        )
    if labels.min() < 0:
        raise ValueError(
            f"`label_column` {column!r} of {name!r} holds {labels.min()} in row {labels.argmin()}: classes are counted"
            " from 0. Take images without a class out."
        )
    declared = getattr(rows.features.get(column), "num_classes", None)
    return torch.from_numpy(labels.astype(np.int64)), declared or int(labels.max()) + 1
