"""Reading series: from files, from GluonTS and from the Hub."""

import gzip
import io
import json
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .frames import numbered, period_freq, quiet_periods, regular_frame, resampled


LIST_COLUMN = "target"
STAMPS_COLUMN = "timestamp"
NAME_COLUMNS = ("id", "item_id")
NPZ_STAMPS = "time"
METADATA_KEYS = ("freq", "time_granularity")
MOST_BYTES = 4 * 2**30  # that an archive may unpack to
DAMAGE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, tarfile.TarError)

_LAYOUT = re.compile(
    r"(?P<root>(?:[^/]+/)*?)(?:(?P<split>train|test)/[^/.][^/]*\.jsonl?|metadata(?:/metadata)?\.json)(?:\.gz)?"
)


@quiet_periods()
def load_series(
    source: str | PathLike,
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    time_column: str | None = None,
    columns: Sequence[str] | None = None,
    freq: str | None = None,
    irregular: str = "error",
    resample: str | None = None,
) -> pd.DataFrame:
    """Series from a file, a folder, GluonTS or the Hub.

    Args:
        source (`str`): One of these:

            - a file `.csv`, `.csv.gz` or `.parquet` with a column for each series;
            - a file `.npz` with arrays `(T, d)`, perhaps the stamps as the array `time` `(T,)`, and for an array `X`
              perhaps the names of its columns as `X_names` `(d,)`, else they are `X_0`, `X_1` and so on;
            - a folder or `.tar.gz` in GluonTS's layout: `metadata.json` or `metadata/metadata.json`, and JSON lines in
              `train/` and `test/`. The series are those of `train`, as long as the longest entries of `test` make
              them; test entries follow the order of the train entries, over and over, or have their `item_id`;
            - the name of a data set of GluonTS, which is fetched and read in the same way;
            - a folder of parquet files, or a name on the Hub, in the layout of `autogluon/chronos_datasets`: a row for
              each series, with the columns `id`, `timestamp` and `target`, the latter two lists.

            Series over different spans are aligned on all stamps that any of them has.
        config_name (`str`, *optional*): Configuration of a data set on the Hub, or a folder's subfolder.
        split (`str`, defaults to `"train"`): Split of a data set on the Hub or of a folder of parquet files.
        cache_dir (`str`, *optional*): Where `datasets`, or GluonTS, keeps what it downloads.
        time_column (`str`, *optional*): The column or array with the stamps. Whole numbers there are no clock, but the
            rows' numbers. Defaults to a file's first column if it holds dates, to `time` in `.npz` files and to
            `timestamp` in the long layout. GluonTS's layout has none.
        columns (`Sequence[str]`, *optional*): Series to take, in this order; arrays to take of a `.npz` file; in the
            long layout, the columns that hold values; series are then named `<id>_<column>` if there are several.
            Defaults to all series; all arrays of numbers with two axes; `target`, or else the only list of numbers.
        freq, irregular: See [`regular_frame`]. In GluonTS's layout `freq` defaults to the metadata's.
        resample (`str`, *optional*): A coarser step, such as `"h"`, to take the mean over: of what is not missing; NaN
            if all is. Periods of several units (`"2h"`) are counted from the first stamp on.

    Returns:
        `pd.DataFrame`: As of [`regular_frame`].

    Raises:
        ValueError: There is no such source or column, a file is damaged, or the series are not regular.
    """
    source, columns = str(source), _names(columns)
    path = Path(source).expanduser()
    suffix = next((suffix for suffix in READ_FILE if path.name.lower().endswith(suffix)), None)
    if path.is_file():
        if suffix is None:
            raise ValueError(f"`source` {source!r} is none of the files that can be read: {', '.join(READ_FILE)}.")
        frame = READ_FILE[suffix](path, time_column, columns, freq)
    elif path.is_dir():
        files = _folder_files(path)
        frame = (
            _read_gluonts(files, source, columns, freq)
            if files
            else _read_long(_subfolder(path, config_name), split, cache_dir, time_column, columns)
        )
    elif suffix or source.startswith((".", "/", "~")):
        raise ValueError(f"`source` {source!r} does not exist: give a file, a folder, or a name on the Hub.")
    elif config_name is None and _is_gluonts_name(source):
        frame = _read_gluonts(_folder_files(_materialized(source, cache_dir)), source, columns, freq)
    else:
        frame = _read_long((source, config_name), split, cache_dir, time_column, columns)
    try:
        regular = regular_frame(frame, freq, irregular)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The series of {source!r} cannot be taken: {error}") from error
    return regular if resample is None else resampled(regular, resample)


def _names(columns: Sequence[str] | None) -> list[str] | None:
    if isinstance(columns, str) or (columns is not None and not columns):
        raise ValueError(f"`columns` must be a list of names, got {columns!r}.")
    return None if columns is None else list(columns)


def _require(names: Iterable[str], there: Iterable[Any], argument: str, source: Any) -> None:
    there = list(there)
    for name in names:
        if name not in there:
            shown = ", ".join(map(repr, there[:20])) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
            raise ValueError(f"`{argument}` {name!r} is not in {str(source)!r}, which has {shown}. Name one of them.")


def _index_of(values: Any, name: str, source: Any) -> pd.Index:
    """Stamps without a time zone, periods, or whole numbers."""
    column = pd.Series(values)
    if isinstance(column.dtype, pd.PeriodDtype) or pd.api.types.is_integer_dtype(column.dtype):
        return pd.Index(column)
    try:
        if pd.api.types.is_numeric_dtype(column.dtype):
            raise ValueError(f"it is of {column.dtype}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Could not infer format", UserWarning)
            return pd.DatetimeIndex(pd.to_datetime(column, utc=True)).tz_localize(None)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`time_column` {name!r} of {str(source)!r} does not hold time stamps, but {str(column.iloc[0])!r} in"
            f" its first row ({error}): name another, or write them like 2000-01-31 12:00."
        ) from error


def _is_dates(values: pd.Series) -> bool:
    try:
        return isinstance(_index_of(values, "", ""), pd.DatetimeIndex | pd.PeriodIndex)
    except ValueError:
        return False


def _selected(frame: pd.DataFrame, columns: list[str] | None, source: Any) -> pd.DataFrame:
    _require(columns or (), frame.columns, "columns", source)
    return frame if columns is None else frame[columns]


# --- a column for each series


def _read_csv(path: Path, time_column: str | None, columns: list[str] | None, freq: str | None) -> pd.DataFrame:
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0]
        table = pd.read_csv(path, float_precision="round_trip")
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as a table ({error}): it is empty, damaged or no CSV.") from error
    if header.dropna().duplicated().any():  # pandas would give the second another name
        raise ValueError(f"{path} has the column {header[header.dropna().duplicated()].iloc[0]!r} more than once.")
    if time_column is None and pd.isna(header.iloc[0]) and pd.api.types.is_integer_dtype(table.dtypes.iloc[0]):
        time_column = table.columns[0]  # rows' numbers, as pandas writes them, are no series
    return _wide(table, path, time_column, columns)


def _read_parquet(path: Path, time_column: str | None, columns: list[str] | None, freq: str | None) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as a table ({error}): it is damaged or no parquet.") from error
    index = table.index
    is_clock = isinstance(index, pd.DatetimeIndex | pd.PeriodIndex)
    if is_clock and time_column in (None, index.name) or (time_column is not None and index.name == time_column):
        time_column = time_column or "time"
        table = table.rename_axis(time_column).reset_index()
    return _wide(table, path, time_column, columns)


def _wide(table: pd.DataFrame, path: Path, time_column: str | None, columns: list[str] | None) -> pd.DataFrame:
    """A table as a frame with its index."""
    if table.empty:
        raise ValueError(f"{path} holds no rows of series.")
    if time_column is None and _is_dates(table.iloc[:, 0]):
        time_column = table.columns[0]
    if time_column is None:
        return _selected(table.reset_index(drop=True), columns, path)
    _require([time_column], table.columns, "time_column", path)
    index = _index_of(table[time_column], time_column, path)
    return _selected(table.drop(columns=time_column), columns, path).set_axis(index, axis=0)


def _read_npz(path: Path, time_column: str | None, columns: list[str] | None, freq: str | None) -> pd.DataFrame:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged, or holds pickled objects.") from error
    _require(columns or (), arrays, "columns", path)
    _require([time_column] if time_column else (), arrays, "time_column", path)
    names = columns or [name for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "iufb"]
    lengths = {name: len(np.atleast_1d(arrays[name])) for name in names}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"{path} has the arrays {lengths or list(arrays)}, not arrays (T, d) of numbers with the same T: name"
            " those to take with `columns`."
        )
    table = pd.concat([_npz_table(name, arrays, path) for name in names], axis=1)
    stamps = time_column or (NPZ_STAMPS if NPZ_STAMPS in arrays else None)
    if stamps is None:
        return table
    if arrays[stamps].shape != (len(table),):
        raise ValueError(f"`time_column` {stamps!r} of {path} is {arrays[stamps].shape}, the series {table.shape}.")
    return table.set_axis(_index_of(arrays[stamps], stamps, path), axis=0)


def _npz_table(name: str, arrays: dict[str, np.ndarray], path: Path) -> pd.DataFrame:
    array, given = arrays[name], arrays.get(f"{name}_names")
    if array.ndim == 1:
        return pd.DataFrame({name: array})
    if array.ndim != 2:
        raise ValueError(f"The array {name!r} of {path} is {array.shape}: (T, d) is needed.")
    if given is None or given.shape != array.shape[1:]:
        return pd.DataFrame(array, columns=numbered(name, array.shape[1]))
    return pd.DataFrame(array, columns=list(map(str, given)))


# --- GluonTS's layout


class _Entry(NamedTuple):
    """A line of a split."""

    name: str | None
    start: pd.Period
    target: np.ndarray


def _is_gluonts_name(source: str) -> bool:
    if "/" in source:  # spares the import
        return False
    try:
        from gluonts.dataset.repository import datasets
    except ImportError:
        return False
    return source in datasets.dataset_names


def _materialized(name: str, cache_dir: str | None) -> Path:
    """The folder that GluonTS keeps a data set in, which its own reader would round to float32."""
    from gluonts.dataset.repository import datasets

    root = Path(cache_dir) if cache_dir else datasets.default_dataset_path
    try:
        return datasets.materialize_dataset(name, path=root)
    except (OSError, EOFError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The data set {name!r} of GluonTS could not be fetched ({error}): if there is no connexion, give a folder"
            f" or archive with it; and remove {root / name} before the next attempt, should it be there."
        ) from error


def _folder_files(path: Path) -> dict[str, bytes]:
    """The files of a folder in GluonTS's layout; none of a folder in another."""
    if not any(list(path.glob(pattern)) for pattern in ("metadata.json", "metadata/metadata.json")):
        return {}
    patterns = ("metadata.json", "metadata/metadata.json", "train/*", "test/*")
    files = [file for pattern in patterns for file in sorted(path.glob(pattern)) if file.is_file()]
    names = {file.relative_to(path).as_posix(): file for file in files}
    return {name: _unzipped(name, file.read_bytes()) for name, file in names.items() if _LAYOUT.fullmatch(name)}


def _read_archive(path: Path, time_column: str | None, columns: list[str] | None, freq: str | None) -> pd.DataFrame:
    return _read_gluonts(_archive_files(path), str(path), columns, freq)


def _archive_files(path: Path) -> dict[str, bytes]:
    """Files of an archive in GluonTS's layout, read in memory: no path in it is ever written to."""
    files, total = {}, 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                total += member.size
                # before its content is read, or skipped, which takes as long
                if member.size < 0 or total > MOST_BYTES:
                    raise ValueError(f"{member.name!r} brings it to {total} bytes, and {MOST_BYTES} are the most")
                content = archive.extractfile(member) if member.isreg() and _LAYOUT.fullmatch(member.name) else None
                if content is not None:
                    files[member.name] = _unzipped(member.name, content.read())
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged, or no archive of series.") from error
    return files


def _unzipped(name: str, content: bytes) -> bytes:
    if not name.endswith(".gz"):
        return content
    try:
        with gzip.open(io.BytesIO(content)) as file:
            content = file.read(MOST_BYTES + 1)
    except DAMAGE as error:
        raise ValueError(f"{name} is cut short or damaged ({error}): fetch it again.") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{name} unpacks to more than {MOST_BYTES} bytes.")
    return content


def _read_gluonts(files: dict[str, bytes], source: str, columns: list[str] | None, freq: str | None) -> pd.DataFrame:
    places = [(found["root"], found["split"], name) for name in sorted(files) if (found := _LAYOUT.fullmatch(name))]
    of = {part: [name for _, split, name in places if split == part] for part in (None, "train", "test")}
    roots = {root for root, _, _ in places}
    if not of["train"] or len(roots) != 1:
        raise ValueError(
            f"{source!r} holds {'no train/*.json' if not of['train'] else f'several data sets, {sorted(roots)}'}: one"
            " data set in GluonTS's layout, with metadata.json, train/ and test/, is needed."
        )
    freq = freq or _metadata_freq({name: files[name] for name in of[None]}, source)
    train, test = (_entries({name: files[name] for name in of[split]}, source, freq) for split in ("train", "test"))
    if not train:
        raise ValueError(f"{source!r} has no series in its train split.")
    names = [entry.name for entry in train]
    unique = None not in names and len(set(names)) == len(names)
    entries = _longest(train, test, unique, source)
    labels = [str(name) for name in names] if unique else numbered("series", len(names))
    series = {
        label: pd.Series(entry.target, pd.period_range(entry.start, periods=len(entry.target)))
        for label, entry in zip(labels, entries, strict=True)
    }
    return _selected(_aligned(series, source), columns, source)


def _metadata_freq(files: dict[str, bytes], source: str) -> str:
    for name, content in files.items():
        try:
            metadata = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{name} of {source!r} is damaged ({error}): fetch it again.") from error
        for key in METADATA_KEYS:
            if isinstance(metadata, dict) and isinstance(metadata.get(key), str):
                return period_freq(metadata[key])
    raise ValueError(f"{source!r} has no {' or '.join(METADATA_KEYS)} in its metadata: give `freq`.")


def _entries(files: dict[str, bytes], source: str, freq: str) -> list[_Entry]:
    period = period_freq(freq)
    entries = []
    for name, content in files.items():
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entries.append(_entry(json.loads(line), period))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {name} of {source!r} is no series ({type(error).__name__}: {error}): a `start`"
                    " and a `target` of at least one number are needed."
                ) from error
    return entries


def _entry(line: dict[str, Any], freq: str) -> _Entry:
    target, start, name = np.asarray(line["target"], np.float64), pd.Period(line["start"], freq), line.get("item_id")
    if target.ndim != 1 or not len(target) or start is pd.NaT:
        raise ValueError(f"start {line['start']!r}, target of the shape {target.shape}")
    return _Entry(None if name is None else str(name), start, target)


def _longest(train: list[_Entry], test: list[_Entry], unique: bool, source: str) -> list[_Entry]:
    """The train entries, each as its longest test entry continues it."""
    places = {entry.name: place for place, entry in enumerate(train)}
    by_name = unique and {entry.name for entry in test} <= set(places)
    if not by_name and len(test) % len(train):
        raise ValueError(
            f"{source!r} has {len(test)} test entries for {len(train)} series, which is no whole number of windows:"
            " give each entry the `item_id` of its series."
        )
    longest = list(train)
    for number, entry in enumerate(test):
        place = places[entry.name] if by_name else number % len(train)
        known = train[place].target
        if entry.start != train[place].start or not np.allclose(
            entry.target[: len(known)], known, rtol=1e-6, atol=0, equal_nan=True
        ):
            raise ValueError(
                f"Test entry {number} of {source!r}, {len(entry.target)} values from {entry.start} on, does not extend"
                f" series {place} of its train split, {len(known)} values from {train[place].start} on."
            )
        longest[place] = max(longest[place], entry, key=lambda entry: len(entry.target))
    return longest


def _aligned(series: dict[str, pd.Series], source: Any) -> pd.DataFrame:
    """Series as columns, on the union of their stamps."""
    first = next(iter(series.values())).index
    if all(one.index.equals(first) for one in series.values()):
        return pd.DataFrame({name: one.to_numpy() for name, one in series.items()}, first)
    for name, one in series.items():
        if one.index.has_duplicates:
            doubled = one.index[one.index.duplicated()][0]
            raise ValueError(
                f"The series {name!r} of {str(source)!r} has {doubled} more than once, and cannot be aligned with the"
                " others: drop one of the values."
            )
    return pd.concat(series, axis=1).sort_index()


# --- a row for each series


def _subfolder(path: Path, config_name: str | None) -> tuple[str, str | None]:
    """What to hand to `datasets`: a folder, and a configuration that is no folder in it."""
    inner = path / config_name if config_name else path
    return (str(inner), None) if inner.is_dir() else (str(path), config_name)


def _read_long(
    source: tuple[str, str | None],
    split: str,
    cache_dir: str | None,
    time_column: str | None,
    columns: list[str] | None,
) -> pd.DataFrame:
    name, config_name = source
    rows = _load_rows(name, config_name, split, cache_dir)
    values, stamps = _long_columns(rows, name, time_column, columns)
    labels = next((column for column in NAME_COLUMNS if column in rows.column_names), None)
    table = rows.select_columns([*values, stamps, *([labels] if labels else [])]).with_format("arrow")[:]
    series: dict[str, pd.Series] = {}
    for row in range(len(rows)):
        label = str(table[labels][row].as_py()) if labels else f"series_{row}"
        lists = {column: _list_of(table[column][row], label, name) for column in (stamps, *values)}
        index = _index_of(lists[stamps], stamps, name)
        for column in values:
            key = label if len(values) == 1 else f"{label}_{column}"
            if key in series:
                raise ValueError(f"{name!r} has the series {key!r} more than once: give each a name of its own.")
            if len(lists[column]) != len(index):
                raise ValueError(
                    f"The series {label!r} of {name!r} has {len(lists[column])} values in {column!r}, and {len(index)}"
                    f" stamps in {stamps!r}."
                )
            series[key] = pd.Series(lists[column].to_numpy(), index)
    return _aligned(series, name)


def _load_rows(name: str, config_name: str | None, split: str, cache_dir: str | None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        rows = load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"The series {name!r} could not be loaded ({error}): give a name on the Hub, with `config_name` if it has"
            " several configurations, a name of GluonTS, or a file or folder that exists."
        ) from error
    if not len(rows):
        raise ValueError(f"The split {split!r} of {name!r} is empty.")
    return rows


def _long_columns(rows: Any, name: str, time_column: str | None, columns: list[str] | None) -> tuple[list[str], str]:
    """The columns of values, and that of stamps."""
    from datasets import LargeList, List

    lists = {key: feature for key, feature in rows.features.items() if isinstance(feature, List | LargeList)}
    if not lists:
        raise ValueError(
            f"{name!r} has no columns of lists, but {rows.column_names}: a row for each series is needed. Name the"
            " file itself if it has a column for each series."
        )
    stamps = time_column or STAMPS_COLUMN
    _require([stamps], lists, "time_column", name)
    numbers = [
        key
        for key, feature in lists.items()
        if key != stamps and re.match(r"u?int|float", getattr(feature.feature, "dtype", ""))
    ]
    if columns is None:
        columns = [LIST_COLUMN] if LIST_COLUMN in numbers or len(numbers) != 1 else numbers
    _require(columns, numbers, "columns", name)
    return columns, stamps


def _list_of(entry: Any, label: str, name: str) -> pd.Series:
    if not entry.is_valid or not len(entry.values):
        raise ValueError(f"The series {label!r} of {name!r} is empty: leave it out.")
    return pd.Series(entry.values.to_pandas())


READ_FILE: dict[str, Callable[[Path, str | None, list[str] | None, str | None], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".tar.gz": _read_archive,
    ".tgz": _read_archive,
}
