"""IDX files: written here by the format's own description, read by `data.idx`."""

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusers_vsdm.data.idx import read_idx
from diffusers_vsdm.data.images import load_images


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, prefix, images, labels, compress=False):
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


def random_split(seed, n):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 6, 5), dtype=np.uint8), generator.integers(0, 4, n, dtype=np.uint8)


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def folder(tmp_path, request):
    write(tmp_path, "train", *random_split(0, 20), request.param)
    write(tmp_path, "t10k", *random_split(1, 7), request.param)
    return tmp_path


@settings(max_examples=40, deadline=None)
@given(
    array=st.integers(1, 3).flatmap(lambda n: arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * n))), gz=st.booleans()
)
def test_arrays_come_back_as_they_were(tmp_path_factory, array, gz):
    path = tmp_path_factory.getbasetemp() / ("a.gz" if gz else "a")
    path.write_bytes(gzip.compress(idx(array)) if gz else idx(array))
    assert np.array_equal(read_idx(path, array.ndim), array)


@pytest.mark.parametrize("split, seed, n", [("train", 0, 20), ("test", 1, 7)])
def test_a_folder_is_a_data_set_of_grey_pictures_with_labels(folder, split, seed, n):
    images, labels = random_split(seed, n)
    data = load_images(str(folder), channels=1, split=split, label_column="label")
    assert len(data) == n and data.event_shape == (1, 6, 5) and data.num_classes == 4
    assert data.labels.tolist() == labels.tolist()
    batch = ((data.__getitems__(list(range(n))) + 1) * 127.5).round().byte()
    assert np.array_equal(batch[:, 0], images)
    assert data.rows[0]["image"].mode == "L" and data.rows[0]["label"] == labels[0]


def test_they_are_resized_coloured_and_cut_as_others_are(folder):
    data = load_images(str(folder), channels=3, resolution=8, max_samples=3, label_column="label")
    assert data.__getitems__([0, 1, 2]).shape == (3, 3, 8, 8)
    assert torch.equal(data[0][0], data[0][2])
    # the classes are those of the whole split
    assert len(data) == len(data.labels) == 3 and data.num_classes == 4
    assert load_images(str(folder), channels=1).labels is None


def test_damage_is_reported(tmp_path):
    images, labels = random_split(0, 3)
    file = tmp_path / "file"
    for content, message in (
        (b"", "starts with nothing"),
        (idx(labels), "starts with 00000801, not with 00000803"),
        (b"\x00\x00\x0d" + idx(images)[3:], "starts with 00000d03"),
        (idx(images)[:9], "within its header"),
        (idx(images)[:-1], "holds 89 values, and its header says 3 x 6 x 5"),
        (idx(images) + b"0", "holds 91 values"),
        (idx(images[:0]), "header says 0 x 6 x 5"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(file, 3)
    whole = gzip.compress(idx(images))
    for content in (whole[:-20], b"not gzip", whole[:12] + b"\xff" * 8 + whole[20:]):
        (tmp_path / "file.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"file.gz is cut short or damaged"):
            read_idx(tmp_path / "file.gz", 3)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    images, labels = random_split(0, 3)
    write(tmp_path, "train", images, labels[:2])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte holds 3 images, but .* 2 labels"):
        load_images(str(tmp_path), channels=1)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte, of the split 'train', is missing"):
        load_images(str(tmp_path), channels=1)
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte, of the split 'test', is missing"):
        load_images(str(tmp_path), channels=1, split="test")
    with pytest.raises(ValueError, match="`split` of IDX files must be one of .*'train', 'test'.*'validation'"):
        load_images(str(tmp_path), channels=1, split="validation")
