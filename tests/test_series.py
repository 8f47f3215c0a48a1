"""Series: every layout written here by its own description and read back, and what makes a frame regular."""

import gzip
import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm.data import series
from diffusers_vsdm.data.frames import as_gluonts_entries, frames_of, period_freq, regular_frame, rolling_windows
from diffusers_vsdm.data.series import load_series


DATA = os.environ.get("VSDM_TEST_DATA")
real_data = pytest.mark.skipif(not DATA, reason="VSDM_TEST_DATA is not set: it names the folder with timeseries/")


@pytest.fixture(autouse=True)
def _no_warnings():
    """Users are not to see what pandas thinks of frequencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def values(rows, columns=2, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def stamped(rows=5, freq="h", start="2020-01-01"):
    return pd.DataFrame(values(rows), pd.date_range(start, periods=rows, freq=freq), ["a", "b"])


def stamps_of(frame):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of business days
        return frame.index.to_timestamp()


def step_of(frame):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return frame.index.freqstr


def is_same(frame, expected, freq=None):
    assert frame.columns.tolist() == expected.columns.tolist()
    assert (frame.dtypes == np.float64).all()
    np.testing.assert_array_equal(frame.to_numpy(), expected.to_numpy())
    if freq is None:
        assert isinstance(frame.index, pd.RangeIndex) and frame.index.equals(pd.RangeIndex(len(expected)))
    else:
        assert isinstance(frame.index, pd.PeriodIndex) and step_of(frame) == freq
        assert stamps_of(frame).tolist() == expected.index.tolist()
    return True


# --- files with a column for each series


def write_csv(frame, path):
    frame.to_csv(path, index=isinstance(frame.index, pd.DatetimeIndex))


def write_parquet(frame, path):
    frame.to_parquet(path)


def write_npz(frame, path):
    stamps = {"time": frame.index.to_numpy()} if isinstance(frame.index, pd.DatetimeIndex) else {}
    np.savez(path, x=frame.to_numpy(), x_names=frame.columns.to_numpy(str), **stamps)


WRITE = {"csv": write_csv, "csv.gz": write_csv, "parquet": write_parquet, "npz": write_npz}


@pytest.mark.parametrize("suffix", WRITE)
@pytest.mark.parametrize("clock", [True, False])
def test_a_file_comes_back_as_it_was(tmp_path, suffix, clock):
    frame = stamped(50) if clock else stamped(50).reset_index(drop=True)
    frame.iloc[3, 1] = np.nan
    path = tmp_path / f"file.{suffix}"
    WRITE[suffix](frame, path)
    assert is_same(load_series(path), frame, "h" if clock else None)
    if suffix != "npz":
        assert is_same(load_series(str(path), columns=["b"]), frame[["b"]], "h" if clock else None)
        with pytest.raises(ValueError, match="`columns` 'c' is not in .*'a', 'b'"):
            load_series(path, columns=["c"])
    with pytest.raises(ValueError, match="`time_column` 'when' is not in"):
        load_series(path, time_column="when")


def test_the_time_column_of_a_table_may_be_any(tmp_path):
    frame = stamped(4)
    path = tmp_path / "file.csv"
    frame.assign(when=frame.index).to_csv(path, index=False)
    assert is_same(load_series(path, time_column="when"), frame, "h")
    with pytest.raises(ValueError, match="'when' is of .*, not of numbers"):
        load_series(path)
    # numbers of rows are a clock only by name, and then a gap counts
    path.write_text("t,a\n3,1\n4,2\n6,3\n")
    assert load_series(path).columns.tolist() == ["t", "a"]
    counted = load_series(path, time_column="t")
    assert counted.index.equals(pd.RangeIndex(3, 7))
    np.testing.assert_array_equal(counted["a"], [1, 2, np.nan, 3])
    with pytest.raises(ValueError, match="`time_column` 'a' of .* does not hold time stamps, but '0.5'"):
        path.write_text("t,a\n3,.5\n")
        load_series(path, time_column="a")
    # what to_csv writes in front is no series
    stamped(4).reset_index(drop=True).to_csv(path)
    assert load_series(path).columns.tolist() == ["a", "b"]


def test_stamps_of_several_offsets_become_utc(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text(
        "t,a\n2020-03-29T00:00+01:00,1\n2020-03-29T01:00+01:00,2\n2020-03-29T03:00+02:00,3\n2020-03-29T04:00+02:00,4\n"
    )
    frame = load_series(path)
    assert frame.index[0] == pd.Period("2020-03-28 23:00", "h") and frame["a"].tolist() == [1, 2, 3, 4]


def test_a_parquet_file_without_the_first_rows_has_no_clock(tmp_path):
    frame = stamped(6).reset_index(drop=True).iloc[2:]
    frame.to_parquet(tmp_path / "file.parquet")
    assert is_same(load_series(tmp_path / "file.parquet"), frame.reset_index(drop=True))


def test_arrays_of_a_file_are_joined_or_chosen(tmp_path):
    path = tmp_path / "file.npz"
    x, y, z = values(6), values(6, 3, 1), values(4, 1, 2)
    hours = np.arange("2020-01-01", "2020-01-01T06", dtype="datetime64[h]")
    np.savez(path, x=x, y=y, y_names=np.array(["p", "q"]), time=hours.astype(str), w=values(6)[:, 0])
    frame = load_series(path)
    # names of the wrong length are not for these columns
    assert frame.columns.tolist() == ["x_0", "x_1", "y_0", "y_1", "y_2"] and step_of(frame) == "h"
    np.testing.assert_array_equal(frame, np.hstack([x, y]))
    assert load_series(path, columns=["y", "w"]).columns.tolist() == ["y_0", "y_1", "y_2", "w"]
    np.savez(path, x=x, z=z)
    with pytest.raises(ValueError, match=r"arrays \{'x': 6, 'z': 4\}"):
        load_series(path)
    np.testing.assert_array_equal(load_series(path, columns=["z"]), z)
    np.savez(path, x=x, time=hours[1:])
    with pytest.raises(ValueError, match=r"`time_column` 'time' of .* is \(5,\), the series \(6, 2\)"):
        load_series(path)
    np.savez(path, x=values(6)[None])
    with pytest.raises(ValueError, match=r"arrays \['x'\]"):
        load_series(path)
    with pytest.raises(ValueError, match=r"'x' of .* is \(1, 6, 2\)"):
        load_series(path, columns=["x"])
    with pytest.raises(ValueError, match="`columns` must be a list of names, got 'x'"):
        load_series(path, columns="x")


def test_damaged_files_are_named(tmp_path):
    npz, csv, parquet, packed = (tmp_path / f"f.{suffix}" for suffix in ("npz", "csv", "parquet", "csv.gz"))
    write_npz(stamped(), npz)
    npz.write_bytes(npz.read_bytes()[:-40])
    csv.write_bytes(b"")
    parquet.write_bytes(b"PAR1 not so")
    packed.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 99)[:-12])
    for path in (npz, csv, parquet, packed):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
            load_series(path)
    npz.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="f.npz cannot be read"):
        load_series(npz)
    np.savez(npz, x=np.array([[print]], dtype=object))
    with pytest.raises(ValueError, match="f.npz cannot be read .*pickle"):
        load_series(npz)
    csv.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match="the column 'a' more than once"):
        load_series(csv)
    csv.write_text("a,b\n")
    with pytest.raises(ValueError, match="f.csv holds no rows"):
        load_series(csv)


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "file.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the files that can be read: .csv"):
        load_series(tmp_path / "file.xlsx")
    for missing in ("missing.csv", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="missing.* does not exist"):
            load_series(missing)
    write_csv(stamped(), tmp_path / "file.csv")
    with pytest.raises(ValueError, match="`irregular` must be one of"):
        load_series(tmp_path / "file.csv", irregular="ignore")


# --- GluonTS's layout


def entry(start, target, **more):
    return {"start": start, "target": list(target), **more}


def layout(train, test=(), metadata=None, suffix=".json"):
    """Names to contents."""
    files = {"metadata/metadata.json": json.dumps(metadata or {"time_granularity": "B"}).encode()}
    for split, entries in (("train", train), ("test", test)):
        lines = "".join(json.dumps(one) + "\n" for one in entries).encode()
        if entries:
            files[f"{split}/data{suffix}"] = gzip.compress(lines) if suffix.endswith(".gz") else lines
    return files


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_archive(path, files, root="data/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(root + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def windows(x, train, length, start="2020-01-02", **more):
    """Entries of two splits as GluonTS has them: the test split holds windows of all series, ever longer."""
    ends = range(train + length, len(x) + 1, length)
    return (
        [entry(start, x[:train, i], **more) for i in range(x.shape[1])],
        [entry(start, x[:end, i], **more) for end in ends for i in range(x.shape[1])],
    )


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl"])
def test_gluonts_layout_comes_back_with_its_windows(tmp_path, archive, suffix):
    x = values(12, 3)
    files = layout(*windows(x, 6, 2), suffix=suffix) | {"train/.hidden.json": b"not JSON"}
    source = write_archive(tmp_path / "x.tar.gz", files) if archive else write_folder(tmp_path / "x", files)
    frame = load_series(source)
    assert frame.columns.tolist() == ["series_0", "series_1", "series_2"]
    np.testing.assert_array_equal(frame, x)
    # 2020-01-02 is a Thursday
    assert step_of(frame) == "B" and stamps_of(frame)[2] == pd.Timestamp("2020-01-06")
    np.testing.assert_array_equal(load_series(source, columns=["series_2"]), x[:, 2:])


def test_entries_are_told_by_their_ids_where_they_have_them(tmp_path):
    x = values(8)
    train = [entry("2020-01-01", x[:4, 0], item_id="p"), entry("2020-01-01", x[:4, 1], item_id=7)]
    test = [entry("2020-01-01", x[:, 1], item_id=7), entry("2020-01-01", x[:6, 0], item_id="p")]
    frame = load_series(write_folder(tmp_path, layout(train, test, {"freq": "1H"})))
    assert frame.columns.tolist() == ["p", "7"] and step_of(frame) == "h"
    np.testing.assert_array_equal(frame["7"], x[:, 1])
    np.testing.assert_array_equal(frame["p"], [*x[:6, 0], np.nan, np.nan])


def test_ids_that_count_the_windows_leave_it_to_the_order(tmp_path):
    x = values(8)
    train, test = windows(x, 4, 2)
    for entries in (train, test):
        for number, one in enumerate(entries):
            one["item_id"] = number
    frame = load_series(write_folder(tmp_path, layout(train, test)))
    assert frame.columns.tolist() == ["0", "1"]
    np.testing.assert_array_equal(frame, x)


def test_series_of_different_spans_are_aligned(tmp_path):
    train = [entry("2020-01-01", [1.0, "NaN", 3.0]), entry("2020-01-03", [4.0, None]), entry("2020-01-07", [5.0])]
    frame = load_series(write_folder(tmp_path, layout(train, metadata={"freq": "D"})))
    nan = np.nan
    expected = [[1, nan, 3, nan, nan, nan, nan], [nan, nan, 4, nan, nan, nan, nan], [nan] * 6 + [5]]
    np.testing.assert_array_equal(frame.T, expected)
    assert frame.index.equals(pd.period_range("2020-01-01", periods=7, freq="D"))
    # another frequency than the metadata's, where that is wrong
    assert load_series(tmp_path, freq="2D").shape == (4, 3)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"train/x.json": b'{"start": "2020"'}, "Line 1 of .*train/x.json of .* is no series"),
        ({"train/x.json": b'\n{"start": "2020-01-01"}'}, "Line 2 of .*train/x.json of .*KeyError"),
        ({"train/x.json": b'{"start": "2020-01-01", "target": [[1.0]]}'}, r"target of the shape \(1, 1\)"),
        ({"train/x.json": b'{"start": "2020-01-01", "target": []}'}, r"target of the shape \(0,\)"),
        ({"train/x.json": b'{"start": null, "target": [1]}'}, "start None"),
        ({"train/x.json": b'{"start": "soon", "target": [1]}'}, "Line 1 of .*train/x.json"),
        ({"train/x.json": b'{"start": "2020-01-01", "target": ["one"]}'}, "Line 1 of .*train/x.json"),
        ({"train/x.json": b'{"start": "2020-01-01", "target": [Infinity]}'}, "'series_0' holds inf"),
        ({"train/x.json": b"7"}, "Line 1 of .*train/x.json"),
        ({"train/x.json": b"\n"}, "no series in its train split"),
        ({"train/x.json.gz": b"not gzip"}, "x.json.gz is cut short or damaged"),
        ({"train/x.csv": b"a\n1"}, "no train"),
        ({"metadata/metadata.json": b"{"}, "metadata.json of .* is damaged"),
        ({"metadata/metadata.json": b"[]"}, "no freq or time_granularity"),
        ({"metadata/metadata.json": b'{"freq": "fortnight"}'}, "`freq` 'fortnight' is no period"),
        (
            {"test/x.json": b'{"start": "2020-01-01", "target": [1.0, 3.0]}'},
            "Test entry 0 .* does not extend series 0",
        ),
        (
            {"test/x.json": b'{"start": "2020-01-02", "target": [1.0, 2.0]}'},
            "Test entry 0 .* does not extend series 0",
        ),
        ({"test/x.json": b'{"start": "2020-01-01", "target": [1.0]}'}, "Test entry 0 .* does not extend series 0"),
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_what_is_wrong_in_the_layout_is_named(tmp_path, files, message, archive):
    good = {"metadata/metadata.json": b'{"freq": "D"}', "train/x.json": b'{"start": "2020-01-01", "target": [1, 2]}'}
    if any(name.startswith("train") for name in files):
        del good["train/x.json"]
    source = (write_archive if archive else write_folder)(tmp_path / "x.tar.gz", good | files)
    with pytest.raises(ValueError, match=message):
        load_series(source)


def test_test_entries_must_be_whole_windows(tmp_path):
    train, test = windows(values(8), 4, 2)
    with pytest.raises(ValueError, match="3 test entries for 2 series, which is no whole number of windows"):
        load_series(write_folder(tmp_path, layout(train, test[:-1])))


def test_an_archive_is_read_in_memory_alone(tmp_path, monkeypatch):
    x = values(6)
    files = layout(*windows(x, 4, 2))
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    source = write_archive(inside / "x.tar.gz", files)
    monkeypatch.chdir(inside)
    with tarfile.open(inside / "y.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("data/train/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name in ("../evil.txt", "/evil.txt", "../../evil.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        with tarfile.open(source) as other:
            for member in other:
                archive.addfile(member, other.extractfile(member))
    np.testing.assert_array_equal(load_series(inside / "y.tar.gz"), x)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "x.tar.gz", "y.tar.gz"]
    write_archive(inside / "y.tar.gz", files | {"../../train/x.json": files["train/data.json"]}, root="")
    with pytest.raises(ValueError, match="several data sets"):
        load_series(inside / "y.tar.gz")


def test_an_archive_that_is_too_large_or_damaged_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.tar.gz"
    member = tarfile.TarInfo("data/train/x.json")
    member.size = 2**40  # the header claims it, and nothing follows
    path.write_bytes(gzip.compress(member.tobuf()))
    with pytest.raises(ValueError, match="x.tar.gz cannot be read .* bytes, and .* are the most"):
        load_series(path)
    member.size = 1000
    path.write_bytes(gzip.compress(member.tobuf() + b"{}"))
    with pytest.raises(ValueError, match="x.tar.gz cannot be read"):
        load_series(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="x.tar.gz cannot be read"):
        load_series(path)
    files = layout([entry("2020-01-01", [1.0] * 500)], suffix=".json.gz")
    write_archive(path, files)
    assert load_series(path).shape == (500, 1)
    monkeypatch.setattr(series, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="train/data.json.gz unpacks to more than 1000 bytes"):
        load_series(path)


def test_a_name_of_gluonts_is_made_and_read(tmp_path, monkeypatch):
    from gluonts.dataset.repository import datasets

    x = values(8)

    def recipe(dataset_path, dataset_writer):
        write_folder(dataset_path, layout(*windows(x, 4, 2), suffix=".json.gz"))

    def offline(dataset_path, dataset_writer):
        raise OSError("no network")

    monkeypatch.setitem(datasets.dataset_recipes, "tiny", recipe)
    monkeypatch.setitem(datasets.dataset_recipes, "far", offline)
    monkeypatch.setattr(datasets, "dataset_names", ["tiny", "far"])
    np.testing.assert_array_equal(load_series("tiny", cache_dir=str(tmp_path)), x)
    with pytest.raises(ValueError, match=r"'far' of GluonTS could not be fetched \(no network\)"):
        load_series("far", cache_dir=str(tmp_path))


def test_gluonts_itself_reads_what_is_read_here(tmp_path):
    from gluonts.dataset import common

    x = values(12, 3)
    write_folder(tmp_path, layout(*windows(x, 6, 2), metadata={"freq": "h"}))
    loaded = common.load_datasets(tmp_path / "metadata", tmp_path / "train", tmp_path / "test")
    frame = load_series(tmp_path)
    last = list(loaded.test)[-3:]
    np.testing.assert_allclose(np.stack([one["target"] for one in last], 1), frame, rtol=1e-6)
    assert all(one["start"] == frame.index[0] for one in last)


# --- a row for each series


def write_long(path, **columns):
    path.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


def hours(*numbers):
    return list(pd.Timestamp("2020-01-01") + pd.to_timedelta(numbers, unit="h"))


def test_the_long_layout_is_aligned(tmp_path):
    source = write_long(
        tmp_path / "x" / "config",
        id=["p", "q"],
        timestamp=[hours(0, 1, 2), hours(2, 3, 5)],
        target=[[1.0, 2.0, np.nan], [4.0, 5.0, 6.0]],
        other=[[7, 8, 9], [10, 11, 12]],
        kind=["sun", "wind"],
    )
    nan, cache = np.nan, str(tmp_path / "cache")
    frame = load_series(source, cache_dir=cache)
    assert frame.columns.tolist() == ["p", "q"]
    np.testing.assert_array_equal(frame.T, [[1, 2, nan, nan, nan, nan], [nan, nan, 4, 5, nan, 6]])
    assert frame.index.equals(pd.period_range("2020-01-01", periods=6, freq="h"))
    both = load_series(str(tmp_path / "x"), "config", cache_dir=cache, columns=["other", "target"])
    assert both.columns.tolist() == ["p_other", "p_target", "q_other", "q_target"]
    np.testing.assert_array_equal(both["q_other"], [nan, nan, 10, 11, nan, 12])
    for arguments, message in (
        ({"columns": ["kind"]}, "`columns` 'kind' is not in .* 'target', 'other'"),
        ({"time_column": "when"}, "`time_column` 'when' is not in"),
        ({"split": "test"}, "could not be loaded .*test"),
    ):
        with pytest.raises(ValueError, match=message):
            load_series(source, cache_dir=cache, **arguments)


def test_mistakes_in_the_long_layout_are_named(tmp_path):
    stamps, two = [hours(0, 1), hours(1, 2)], [[1.0, 2.0], [3.0, 4.0]]
    for number, (columns, message) in enumerate(
        [
            ({"id": ["p", "p"], "timestamp": stamps, "target": two}, "'p' more than once"),
            ({"id": ["p", "q"], "timestamp": stamps, "target": [[1.0], [3.0, 4.0]]}, "1 values in 'target', and 2"),
            ({"id": ["p", "q"], "timestamp": stamps, "target": [None, [3.0, 4.0]]}, "'p' .* is empty"),
            ({"timestamp": stamps, "x": two, "y": two}, "`columns` 'target' is not in .* which has 'x', 'y'"),
            ({"a": [1.0, 2.0], "b": [1.0, 2.0]}, "no columns of lists"),
            ({"timestamp": [hours(0, 0), hours(1, 2)], "target": two}, "'series_0' .* more than once"),
        ]
    ):
        source = write_long(tmp_path / str(number), **columns)
        with pytest.raises(ValueError, match=message):
            load_series(source, cache_dir=str(tmp_path / "cache"))
    # the only list of numbers needs no name
    source = write_long(tmp_path / "x", timestamp=stamps, power=two)
    assert load_series(source, cache_dir=str(tmp_path / "cache")).columns.tolist() == ["series_0", "series_1"]


def test_a_name_that_nobody_has_is_reported(tmp_path, monkeypatch):
    import datasets

    def unknown(name, config_name, split, cache_dir):
        seen.append((name, config_name, split, cache_dir))
        raise ConnectionError("offline")

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(ValueError, match=r"'some/name' could not be loaded \(offline\): give a name on the Hub"):
        load_series("some/name", "config", "test", "cache")
    with pytest.raises(ValueError, match="'nameless' could not be loaded"):
        load_series("nameless")
    assert seen == [("some/name", "config", "test", "cache"), ("nameless", None, "train", None)]


# --- regular frames

FREQS = ("min", "15min", "h", "2h", "D", "B", "W-WED", "M", "2M", "Q-DEC", "Y-DEC")


@settings(max_examples=150, deadline=None)
@given(
    freq=st.sampled_from(FREQS),
    kept=st.lists(st.booleans(), min_size=1, max_size=30),
    start=st.dates(pd.Timestamp("1971-01-01").date(), pd.Timestamp("2060-01-01").date()),
    as_periods=st.booleans(),
)
def test_every_value_keeps_its_stamp_and_gaps_are_nan(freq, kept, start, as_periods):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = pd.period_range(pd.Period(start, freq), periods=len(kept) + 2)
        stamps = whole.to_timestamp()
    kept = np.array([True, *kept, True])
    given_rows = pd.DataFrame(values(len(whole)), whole if as_periods else stamps)[kept]
    frame = regular_frame(given_rows, None if as_periods else freq)
    assert frame.index.equals(whole) and frame.columns.tolist() == ["0", "1"]
    np.testing.assert_array_equal(frame[kept], given_rows)
    assert frame[~kept].isna().all(axis=None)


@pytest.mark.parametrize(
    "stamps, freq",
    [
        (pd.date_range("2020-01-01", periods=9, freq="15min").delete(4), "15min"),
        (pd.date_range("2020-01-01", periods=2, freq="2h"), "2h"),
        (pd.date_range("2020-01-02", periods=4, freq="B"), "B"),
        (pd.date_range("2020-01-02", periods=20, freq="B").delete([3, 7]), "B"),
        (pd.date_range("2020-01-02", periods=20, freq="D").delete([3, 7]), "D"),
        (pd.date_range("2020-01-01", periods=30, freq="MS").delete([3, 7]), "M"),
        (pd.date_range("2020-01-01", periods=30, freq="ME").delete([3, 7]), "M"),
        (pd.date_range("2020-01-01", periods=30, freq="BME"), "M"),
        (pd.date_range("2020-01-01", periods=30, freq="QS").delete([3, 7]), "Q-DEC"),
        (pd.date_range("2020-01-01", periods=30, freq="YS").delete([3, 7]), "Y-DEC"),
        (pd.date_range("2020-01-01", periods=9, freq="W-WED"), "W-WED"),
        (pd.date_range("2020-01-01", periods=20, freq="W-WED").delete([3, 7]), "W-WED"),
        (pd.date_range("2020-01-01", periods=20, freq="3D").delete([3, 7]), "3D"),
        (pd.date_range("2020-01-01 12:00", periods=9, freq="D").delete(2).as_unit("s"), "D"),
    ],
)
def test_the_step_is_found(stamps, freq):
    frame = regular_frame(pd.DataFrame(values(len(stamps)), pd.DatetimeIndex(stamps.tolist())))
    assert step_of(frame) == freq
    assert frame.notna().all(axis=1).sum() == len(stamps)
    assert len(frame) < len(stamps) + 3


def test_business_days_go_on_after_the_weekend():
    days = pd.to_datetime(["2020-01-02", "2020-01-03", "2020-01-07", "2020-01-08"])
    frame = regular_frame(pd.DataFrame({"a": [1.0, 2, 3, 4]}, days), "B")
    np.testing.assert_array_equal(frame["a"], [1, 2, np.nan, 3, 4])
    saturday = pd.DataFrame({"a": [1.0, 2, 3]}, pd.to_datetime(["2020-01-02", "2020-01-03", "2020-01-04"]))
    with pytest.raises(ValueError, match="row 2, 2020-01-04 00:00:00, is off the grid"):
        regular_frame(saturday, "B")
    assert stamps_of(regular_frame(saturday, "B", "renumber"))[-1] == pd.Timestamp("2020-01-06")


def test_irregular_stamps_are_named_or_renumbered():
    frame = stamped(6)
    for rows, freq, message in (
        ([0, 1, 3, 2, 4, 5], None, "row 3, 2020-01-01 02:00:00, comes before the row above it: sort"),
        ([5, 4, 3, 2, 1, 0], None, "row 1, 2020-01-01 04:00:00, comes before"),
        ([0, 1, 2, 2, 3], None, "row 3, 2020-01-01 02:00:00, falls into the same step"),
        ([0, 1, 2, 3], "2h", "row 1, 2020-01-01 01:00:00, is off the grid"),
        ([0, 1, 2, 3], "D", "row 1, 2020-01-01 01:00:00, falls into the same step"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*renumber"):
            regular_frame(frame.iloc[rows], freq)
        renumbered = regular_frame(frame.iloc[rows], freq, irregular="renumber")
        np.testing.assert_array_equal(renumbered, frame.iloc[rows])
        assert renumbered.index.equals(pd.period_range(frame.index[rows[0]], periods=len(rows), freq=freq or "h"))
    late = pd.DataFrame(values(4), hours(0, 1, 2.5, 3))
    with pytest.raises(ValueError, match="row 2, 2020-01-01 02:30:00, is off the grid"):
        regular_frame(late, "h")
    descending = pd.DataFrame(values(3), pd.date_range("2020-01-03", periods=3, freq="-1D"))
    with pytest.raises(ValueError, match="comes before"):
        regular_frame(descending)


def test_a_clock_change_in_local_time_is_renumbered():
    utc = pd.date_range("2020-10-24 22:00", periods=30, freq="15min", tz="UTC")
    local = utc.tz_convert("Europe/Berlin").tz_localize(None)
    frame = pd.DataFrame(values(30), local)
    with pytest.raises(ValueError, match="row 12, 2020-10-25 02:00:00, comes before"):
        regular_frame(frame)
    assert regular_frame(frame, irregular="renumber").index[-1] == pd.Period("2020-10-25 07:15", "15min")
    # with the zone, there is no irregularity
    aware = regular_frame(frame.set_axis(utc.tz_convert("Europe/Berlin"), axis=0))
    assert aware.index.equals(utc.tz_localize(None).to_period()) and aware.notna().all(axis=None)


def test_rows_without_a_clock_are_counted():
    frame = pd.DataFrame({"a": [1.0, 2, 3]}, pd.RangeIndex(4, 10, 2))
    assert regular_frame(frame).index.equals(pd.RangeIndex(4, 10, 2))
    with_gap = regular_frame(frame.set_axis([2, 3, 5], axis=0))
    np.testing.assert_array_equal(with_gap["a"], [1, 2, np.nan, 3])
    assert regular_frame(frame.set_axis([2, 3, 5], axis=0), irregular="renumber").index.equals(pd.RangeIndex(2, 5))
    assert regular_frame(frame.iloc[:1]).index.equals(pd.RangeIndex(4, 5))
    with pytest.raises(ValueError, match="row 2, 5, is off the grid"):
        regular_frame(frame.set_axis([0, 2, 5], axis=0).reindex([0, 2, 5, 7]))
    with pytest.raises(ValueError, match="`freq` is 'h', but the rows have no time stamps"):
        regular_frame(frame, "h")


def test_types_of_numbers_are_taken_and_nothing_else():
    index = pd.date_range("2020-01-01", periods=2, freq="D")
    frame = pd.DataFrame({"a": [1, 2], 3: pd.array([None, 4], "Int64"), "c": np.float32([5, 6])}, index)
    regular = regular_frame(frame)
    assert regular.columns.tolist() == ["a", "3", "c"] and (regular.dtypes == np.float64).all()
    np.testing.assert_array_equal(regular, [[1, np.nan, 5], [2, 4, 6]])
    for wrong, message in (
        (frame.assign(d=["x", "y"]), "'d' is of .*, not of numbers"),
        (frame.assign(d=[1j, 2]), "'d' is of complex128"),
        (frame.assign(d=index), "'d' is of datetime64"),
        (frame.assign(d=[0.0, -np.inf]), "'d' holds -inf at 2020-01-02"),
        (frame.rename(columns={"c": "3"}), "'3' is there more than once"),
        (frame.iloc[:0], "`frame` is 0 x 3"),
        (frame[[]], "`frame` is 2 x 0"),
        (frame.set_axis([index[0], pd.NaT], axis=0), "Row 1 has no time stamp"),
        (frame.iloc[:1].set_axis(pd.DatetimeIndex(["2020-01-01"]), axis=0), "`freq` cannot be told from the one"),
        (frame.set_axis(pd.DatetimeIndex(["2020-01-01"] * 2), axis=0), "`freq` cannot be told"),
    ):
        with pytest.raises(ValueError, match=message):
            regular_frame(wrong)
    for wrong in (frame.set_axis([0.5, 1.5], axis=0), frame.set_axis(["x", "y"], axis=0)):
        with pytest.raises(TypeError, match="The index of `frame` holds .*, not time stamps"):
            regular_frame(wrong)
    with pytest.raises(TypeError, match="`frame` must be a pandas DataFrame, got ndarray"):
        regular_frame(frame.to_numpy())


def test_a_stray_stamp_does_not_fill_the_memory():
    frame = pd.DataFrame({"a": [1.0, 2, 3]}, pd.to_datetime(["1900-01-01", "2020-01-01", "2020-01-02"]))
    with pytest.raises(ValueError, match="`freq` 's' makes .* rows of the 3 given"):
        regular_frame(frame, "s")


@pytest.mark.parametrize(
    "alias, name",
    [
        *[("H", "h"), ("h", "h"), ("15T", "15min"), ("30min", "30min"), ("S", "s"), ("M", "M"), ("ME", "M")],
        *[("MS", "M"), ("2MS", "2M"), ("BME", "M"), ("Q", "Q-DEC"), ("QE", "Q-DEC"), ("A", "Y-DEC")],
        *[("A-JUN", "Y-JUN"), ("YE", "Y-DEC"), ("B", "B"), ("2B", "2B"), ("W", "W-SUN"), ("W-WED", "W-WED")],
    ],
)
def test_old_and_new_names_of_steps(alias, name):
    assert period_freq(alias) == name
    frame = regular_frame(
        stamped(3, "3D", "2020-01-06").iloc[:1].set_axis([pd.Timestamp("2020-01-06")], axis=0), alias
    )
    assert step_of(frame) == name


@pytest.mark.parametrize("freq", ["", "foo", "-1D", "0h", "SME", "5"])
def test_steps_that_are_none_are_refused(freq):
    with pytest.raises(ValueError, match="`freq` .* is no period of pandas"):
        period_freq(freq)


@pytest.mark.parametrize(
    "start, given_freq, freq, given_values, means",
    [
        ("2020-01-01 00:30", "15min", "h", [1, 3, np.nan, 5, 7, 9, np.nan], [2, 7, np.nan]),
        ("2020-01-01 01:00", "h", "2h", [1, 3, 5, 7, 9], [2, 6, 9]),
        ("2020-01-02", "B", "W", [1, 3, 5, 7, 9], [2, 7]),
        ("2020-01-30", "D", "MS", [1, 3, 5, 7], [2, 6]),
        ("2020-01-30", "D", "D", [1, 3], [1, 3]),
    ],
)
def test_means_over_coarser_periods(tmp_path, start, given_freq, freq, given_values, means):
    index = pd.date_range(start, periods=len(given_values), freq=given_freq)
    write_csv(pd.DataFrame({"a": given_values, "b": np.nan}, index), tmp_path / "x.csv")
    frame = load_series(tmp_path / "x.csv", freq=given_freq, resample=freq)
    np.testing.assert_array_equal(frame["a"], means)
    assert frame["b"].isna().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert frame.index.equals(pd.period_range(start, periods=len(means), freq=period_freq(freq)))


def test_means_need_a_clock_and_a_coarser_one(tmp_path):
    write_csv(stamped(), tmp_path / "x.csv")
    for freq in ("min", "60min"):
        with pytest.raises(ValueError, match="`resample` is .*, which is not coarser than the series' own 'h'"):
            load_series(tmp_path / "x.csv", resample=freq)
    write_csv(stamped().reset_index(drop=True), tmp_path / "x.csv")
    with pytest.raises(ValueError, match="`resample` is 'h', but the series have no time stamps"):
        load_series(tmp_path / "x.csv", resample="h")


# --- windows and entries


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(2, 40), length=st.integers(1, 12), number=st.integers(1, 6))
def test_windows_part_the_end(rows, length, number):
    frame = regular_frame(stamped(rows, "D"), "D")
    if rows <= length * number:
        with pytest.raises(ValueError, match=f"`frame` has {rows} rows, too few for {number} windows of {length}"):
            rolling_windows(frame, length, number)
        return
    parts = rolling_windows(frame, length, number)
    assert len(parts) == number
    for history, window in parts:
        assert len(window) == length and len(history) >= 1
        assert history.index[-1] + 1 == window.index[0]
        assert pd.concat([history, window]).equals(frame.iloc[: len(history) + length])
    assert pd.concat([parts[0][0], *[window for _, window in parts]]).equals(frame)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_windows_need_positive_numbers(wrong):
    frame = regular_frame(stamped(9))
    with pytest.raises(ValueError, match="`prediction_length` must be a whole number from 1 up"):
        rolling_windows(frame, wrong, 1)
    with pytest.raises(ValueError, match="`num_windows` must be"):
        rolling_windows(frame, 1, wrong)


def test_histories_of_every_kind():
    x = values(5)
    frame = stamped(5)
    start = pd.Period("2020-01-01", "h")
    entry = {"target": x.T, "start": start}
    named = pd.DataFrame(x, columns=["series_0", "series_1"])
    for history, expected, freq, single in (
        (x, named, None, True),
        (x.astype(int), named.astype(int), None, True),
        ([x, x[:3]], named, None, False),
        ((x,), named, None, False),
        (np.stack([x, x]), named, None, False),
        (frame, frame, "h", True),
        ([frame, frame[:2]], frame, "h", False),
        (frame["a"], frame[["a"]], "h", True),
        (pd.Series(x[:, 0]), named[["series_0"]], None, True),
        (entry, named.set_axis(frame.index, axis=0), "h", True),
        ([entry, entry], named.set_axis(frame.index, axis=0), "h", False),
        (iter([entry]), named.set_axis(frame.index, axis=0), "h", False),
    ):
        frames, was_single = frames_of(history)
        assert was_single is single
        assert is_same(frames[0], expected, freq)
    assert [len(one) for one in frames_of([x, x[:3]])[0]] == [5, 3]
    # a step that the frame cannot tell, and that arrays have no need of
    assert step_of(frames_of(frame.iloc[[0]].set_axis(pd.DatetimeIndex(["2020-01-01"])), "B")[0][0]) == "B"
    assert frames_of(x, "B")[0][0].index.equals(pd.RangeIndex(5))


def test_data_sets_of_gluonts_are_histories():
    from gluonts.dataset import common

    x = values(5).astype(np.float32)
    lines = [{"start": "2020-01-02", "target": x.T}, {"start": "2020-01-02", "target": x[:3].T}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = common.ListDataset(lines, freq="B", one_dim_target=False)
    frames, single = frames_of(data)
    assert not single and [len(frame) for frame in frames] == [5, 3]
    np.testing.assert_array_equal(frames[0], x)
    assert step_of(frames[0]) == "B"
    with pytest.raises(ValueError, match=r"`target` of an entry has the shape \(5,\).*one_dim_target=False"):
        frames_of(common.ListDataset([{"start": "2020-01-01", "target": x[:, 0]}], freq="D"))


@pytest.mark.parametrize(
    "history, kind, message",
    [
        (values(5)[:, 0], ValueError, r"shape \(5,\), and .*reshape a single series to \(T, 1\)"),
        ([values(5)[:, 0]], ValueError, r"shape \(5,\)"),
        (values(6).reshape(1, 1, 6, 2), ValueError, r"shape \(1, 1, 6, 2\)"),
        ([np.stack([values(5)])], ValueError, r"shape \(1, 5, 2\)"),
        (np.array([["x"]]), ValueError, "not of numbers"),
        (np.array([[np.inf]]), ValueError, "infinite"),
        ([], ValueError, "`history` is an empty list"),
        (np.zeros((0, 5, 2)), ValueError, "`history` is an empty list"),
        (np.zeros((0, 2)), ValueError, "`frame` is 0 x 2"),
        (None, TypeError, "`history` must be a NumPy array .* got NoneType"),
        ("file.csv", TypeError, "`history` must be .* got str"),
        (3.0, TypeError, "got float"),
        ([1.0, 2.0], TypeError, "got a list with float"),
        ([[1.0, 2.0]], TypeError, "got a list with list"),
        ({"target": [[1.0]]}, ValueError, r"a dictionary without \['start'\]"),
        ({"target": [[1.0]], "start": "2020-01-01"}, TypeError, "`start` of an entry must be a pd.Period"),
        ({"target": [[]], "start": pd.Period("2020-01-01", "D")}, ValueError, "`frame` is 0 x 1"),
    ],
)
def test_what_is_no_history_is_refused(history, kind, message):
    with pytest.raises(kind, match=message):
        frames_of(history)


def test_entries_are_histories_again():
    clocked = regular_frame(stamped(5, "B"))
    plain = regular_frame(pd.DataFrame(values(4, 3)))
    entries = as_gluonts_entries([clocked, plain])
    assert [one["item_id"] for one in entries] == ["0", "1"]
    assert [one["target"].shape for one in entries] == [(2, 5), (3, 4)]
    assert all(one["target"].dtype == np.float32 for one in entries)
    assert entries[0]["start"] == clocked.index[0] and entries[1]["start"] == pd.Period("2000-01-01", "D")
    frames, _ = frames_of(entries)
    assert frames[0].index.equals(clocked.index)
    np.testing.assert_allclose(frames[1], plain, rtol=1e-6)
    with pytest.raises(TypeError, match="is a DatetimeIndex, not a PeriodIndex or RangeIndex: make it regular"):
        as_gluonts_entries([stamped()])


# --- real data


@real_data
def test_exchange_rates():
    frame = load_series(Path(DATA) / "timeseries" / "exchange_rate_nips.tar.gz")
    assert frame.shape == (6221, 8) and frame.notna().all(axis=None)
    assert step_of(frame) == "B" and stamps_of(frame)[0] == pd.Timestamp("1990-01-01")
    assert frame.iloc[0, :2].tolist() == [0.7855, 1.611]
    assert len(rolling_windows(frame, 30, 5)[0][0]) == 6071


@real_data
@pytest.mark.parametrize("columns, width", [(["load"], 96), (["load", "res"], 138), (None, 138)])
def test_electricity(columns, width):
    path = Path(DATA) / "timeseries" / "simbench_2016_15min.npz"
    frame = load_series(path, columns=columns, irregular="renumber", resample="h")
    assert frame.shape == (8784, width) and frame.index[0] == pd.Period("2016-01-01 00:00", "h")
    assert frame.columns[0] == "BL-H_pload" and frame.notna().all(axis=None)
    with np.load(path) as arrays:
        np.testing.assert_allclose(frame.iloc[5000, :96], arrays["load"][20000:20004].mean(0), rtol=1e-5)


@real_data
def test_electricity_has_two_clock_changes():
    with pytest.raises(ValueError, match="row 29096, 2016-10-30 02:00:00, comes before .*renumber"):
        load_series(Path(DATA) / "timeseries" / "simbench_2016_15min.npz")


@real_data
def test_solar():
    frame = load_series(Path(DATA) / "timeseries" / "nrel_solar_fl_dayahead.csv.gz")
    assert frame.shape == (3650, 216) and frame.index.equals(pd.RangeIndex(3650))
