"""Many series on one clock, as pandas frames: made regular, cut into windows, and taken from whatever users have.

A frame holds a column of float64 for each series, with unique names, and NaN where a value is missing. Its index is a
`PeriodIndex` without holes, or a `RangeIndex` where there is no clock.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset


IRREGULAR = ("error", "renumber")
STAND_IN = ("2000-01-01", "D")  # a GluonTS entry needs a start
MOST_STRETCH = 1000  # rows of a grid for each row given, before its step is taken for a mistake
FEW_ROWS = 10**6  # a grid may have so many in any case

# names that pandas has given up, and that old data sets still carry
OLD_NAMES = {"H": "h", "T": "min", "S": "s", "L": "ms", "U": "us", "N": "ns", "A": "Y"}
# where most steps last so many days, they are months, quarters and years
CALENDAR_DAYS = {30: "M", 31: "M", 90: "Q", 91: "Q", 92: "Q", 365: "Y", 366: "Y"}
# one stamp anywhere in each of these is regular
LOOSE = (pd.offsets.MonthEnd, pd.offsets.QuarterEnd, pd.offsets.YearEnd)


@contextlib.contextmanager
def quiet_periods() -> Iterator[None]:
    """Pandas means to give up periods of business days, which GluonTS's data sets are made of, and says so often."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Period(Dtype\[B\]| with BDay freq) is deprecated", FutureWarning)
        yield


@quiet_periods()
def regular_frame(frame: pd.DataFrame, freq: str | None = None, irregular: str = "error") -> pd.DataFrame:
    """A frame on a grid of equal steps, with float64 columns.

    Stamps that the grid has and the index lacks become rows of NaN: a gap is missing values. Stamps with a time zone
    become UTC without one, so days that begin at midnight of a zone with a clock change are no grid: take the zone off
    first (`frame.tz_localize(None)`). One stamp anywhere in each month, quarter or year is regular; in shorter
    periods, all stamps must lie equally far in. What lies between a stamp and the start of its period is dropped.

    Args:
        frame (`pd.DataFrame`): `(T, d)` numbers, with an index of stamps, of periods or of whole numbers.
        freq (`str`, *optional*): The step, such as `"15min"`, `"h"`, `"D"`, `"B"` or `"M"`. Defaults to the index's
            own, else to the one that pandas infers, else to the step between most stamps.
        irregular (`str`, defaults to `"error"`): What to do about stamps that do not ascend, come twice or lie off
            the grid: `"renumber"` takes all rows as consecutive, from the first stamp on. That suits local time with a
            clock change, and also leaves no gap where stamps are missing.

    Returns:
        `pd.DataFrame`: `(T', d)` of float64 with a `PeriodIndex`, or a `RangeIndex` for an index of whole numbers.

    Raises:
        ValueError: A column is not of numbers or holds infinite values, names are doubled, there is nothing in the
            frame, no step can be found, or a stamp is irregular: the message names the first.
        TypeError: It is no frame, or has an index of another kind.
    """
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"`frame` must be a pandas DataFrame, got {type(frame).__name__}.")
    if irregular not in IRREGULAR:
        raise ValueError(f"`irregular` must be one of {IRREGULAR}, got {irregular!r}.")
    names, values = _checked_values(frame)
    clock = _Clock.of(frame.index, freq)
    if irregular == "renumber":
        rows = np.arange(len(frame))
    else:
        clock.check()
        rows = clock.positions // clock.step
    size = int(rows[-1]) + 1
    if size > max(FEW_ROWS, MOST_STRETCH * len(frame)):
        raise ValueError(
            f"`freq` {clock.freq} makes {size} rows of the {len(frame)} given, from {frame.index[0]} to"
            f" {frame.index[-1]}: give the step that most stamps have, or correct the stamps."
        )
    regular = np.full((size, len(names)), np.nan)
    regular[rows] = values
    return pd.DataFrame(regular, clock.index(size), names)


def _checked_values(frame: pd.DataFrame) -> tuple[pd.Index, np.ndarray]:
    """The columns' names and their values `(T, d)`."""
    if 0 in frame.shape:
        raise ValueError(f"`frame` is {frame.shape[0]} x {frame.shape[1]}: it needs a row and a column.")
    names = pd.Index([str(name) for name in frame.columns], dtype=object)
    if names.has_duplicates:
        doubled = names[names.duplicated()][0]
        raise ValueError(f"The column {doubled!r} is there more than once: give each series a name of its own.")
    for name, dtype in zip(names, frame.dtypes, strict=True):
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_complex_dtype(dtype):
            raise ValueError(
                f"The column {name!r} is of {dtype}, not of numbers: leave it out, convert it with `pd.to_numeric`, or"
                " make it the index if it holds the time stamps."
            )
    values = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise ValueError(
            f"The column {names[column]!r} holds {values[row, column]} at {frame.index[row]}: infinite values are"
            " no data; set them to NaN if they are missing."
        )
    return names, values


@dataclass(frozen=True)
class _Clock:
    """Where rows lie on a grid.

    Args:
        stamps: As given, `(T,)`.
        positions: `(T,)` whole numbers, counted from the first row's, of which a step has `step`.
        step: As above.
        off: `(T,)`, whether a stamp is off the grid for another reason than its position.
        freq: The step, in words.
        index: The regular index of so many rows from the first on.
    """

    stamps: pd.Index
    positions: np.ndarray
    step: int
    off: np.ndarray
    freq: str
    index: Callable[[int], pd.Index]

    @classmethod
    def of(cls, index: pd.Index, freq: str | None) -> Self:
        """The clock of an index."""
        if not isinstance(index, pd.MultiIndex) and index.hasnans:
            raise ValueError(f"Row {int(np.argmax(index.isna()))} has no time stamp: give it one, or drop the row.")
        if isinstance(index, pd.PeriodIndex):
            same = freq is None or period_freq(freq) == period_freq(index.freqstr)
            return cls._of_periods(index, index) if same else cls._of_stamps(index, index.to_timestamp(), str(freq))
        if isinstance(index, pd.DatetimeIndex):
            freq = freq or (index.freqstr if index.is_monotonic_increasing else None)
            return cls._of_stamps(index, index if index.tz is None else index.tz_convert(None), freq)
        if pd.api.types.is_integer_dtype(index.dtype):
            return cls._of_numbers(index, freq)
        raise TypeError(
            f"The index of `frame` holds {index.dtype}, not time stamps, periods or whole numbers: convert it with"
            " `pd.to_datetime`, or drop it with `frame.reset_index(drop=True)`."
        )

    @classmethod
    def _of_stamps(cls, given: pd.Index, stamps: pd.DatetimeIndex, freq: str | None) -> Self:
        periods = stamps.to_period(_inferred_freq(stamps) if freq is None else period_freq(freq))
        into = stamps - periods.to_timestamp()
        # a Saturday is put into Monday's period of business days
        off = (into != into[0]) | (into < pd.Timedelta(0))
        return cls._of_periods(given, periods, None if isinstance(periods.freq, LOOSE) else np.asarray(off))

    @classmethod
    def _of_periods(cls, given: pd.Index, periods: pd.PeriodIndex, off: np.ndarray | None = None) -> Self:
        positions = periods.astype("int64").to_numpy()
        return cls(
            stamps=given,
            positions=positions - positions[0],
            step=periods.freq.n,
            off=np.zeros(len(given), bool) if off is None else off,
            freq=repr(periods.freqstr),
            index=lambda size: pd.period_range(periods[0], periods=size),
        )

    @classmethod
    def _of_numbers(cls, index: pd.Index, freq: str | None) -> Self:
        if freq is not None:
            raise ValueError(
                f"`freq` is {freq!r}, but the rows have no time stamps: make their column the index, or name it with"
                " `time_column` to a script, or leave `freq` out."
            )
        numbers = index.to_numpy(np.int64)
        first, step = int(numbers[0]), _common_step(numbers) if len(numbers) > 1 else 1
        return cls(
            stamps=index,
            positions=numbers - first,
            step=step,
            off=np.zeros(len(index), bool),
            freq=str(step),
            index=lambda size: pd.RangeIndex(first, first + size * step, step),
        )

    def check(self) -> None:
        """Refuses the first row that does not ascend to a place on the grid."""
        ahead = np.diff(self.positions, prepend=-1)
        problems = {
            "comes before the row above it: sort the rows (`frame.sort_index()`)": ahead < 0,
            "falls into the same step as the row above it: drop one of them": ahead == 0,
            "is off the grid: give the `freq` that they have": self.off | (self.positions % self.step != 0),
        }
        bad = np.logical_or.reduce(list(problems.values()))
        if bad.any():
            row = int(np.argmax(bad))
            problem = next(problem for problem, where in problems.items() if where[row])
            raise ValueError(
                f"With steps of {self.freq} from {self.stamps[0]} on, row {row}, {self.stamps[row]}, {problem}. If the"
                ' rows are consecutive all the same, as with a clock change in local time, irregular="renumber" takes'
                " them so, in `regular_frame` as in a script."
            )


def period_freq(freq: str) -> str:
    """The name that pandas has for a step as a period, of any alias of an offset or period, old or new.

    Args:
        freq (`str`): Such as `"h"`, `"H"`, `"15T"`, `"MS"`, `"ME"` or `"B"`.

    Returns:
        `str`: Such as `"h"`, `"15min"`, `"M"` or `"B"`.

    Raises:
        ValueError: There is no such period.
    """
    parts = re.fullmatch(r"(\d*)([A-Za-z]+)((?:-\w+)?)", str(freq))
    modern = f"{parts[1]}{OLD_NAMES.get(parts[2], parts[2])}{parts[3]}" if parts else str(freq)
    with quiet_periods():
        try:
            return _period_name(modern)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`freq` {freq!r} is no period of pandas ({error}): give one such as 'min', '15min', 'h', 'D', 'B',"
                " 'W', 'M', 'Q' or 'Y'."
            ) from error


@quiet_periods()
def same_step(own: str | None, number: int, freq: str, size: int) -> bool:
    """Whether so many times, of a step of their own if they know it, have the step `freq`, which makes `size` of them.

    Weeks may end on any day. Of an unknown step there must be more than half of them.
    """
    if own is not None:
        with contextlib.suppress(ValueError):
            found, wanted = (re.sub(r"(?<=W)-\w+$", "", period_freq(name)) for name in (own, freq))
            return found == wanted
    return size == 1 or 2 * (number - 1) > size - 1


def _period_name(freq: str) -> str:
    try:
        index = pd.period_range("2000-01-03", periods=1, freq=pd.PeriodDtype(freq).freq)
        name, number = index.freqstr, index.freq.n
    except ValueError:  # an offset's name, such as MS
        offset = to_offset(freq)
        base = pd.date_range("2000-01-03", periods=1, freq=offset.base).to_period().freqstr
        name, number = f"{offset.n}{base}" if offset.n != 1 else base, offset.n
    if number < 1:
        raise ValueError("it does not lead on")
    return name


def _common_step(numbers: np.ndarray) -> int:
    """The commonest difference of neighbours; the smallest of several."""
    steps, counts = np.unique(np.diff(np.unique(numbers)), return_counts=True)
    return int(steps[np.argmax(counts)]) if len(steps) else 1


def _inferred_freq(stamps: pd.DatetimeIndex) -> str:
    """The step of stamps, not all of which may be there, or be in order."""
    known = stamps.unique().sort_values()
    if len(known) < 2:
        raise ValueError(f"`freq` cannot be told from the one time stamp {stamps[0]}: give it.")
    try:
        inferred = pd.infer_freq(known)
        if inferred is not None:
            return period_freq(inferred)
    except ValueError:  # too few stamps, or a step that no periods have
        pass
    step = pd.Timedelta(_common_step(known.as_unit("ns").astype("int64").to_numpy()), unit="ns")
    if step % pd.Timedelta(days=1):
        return period_freq(to_offset(step).freqstr)
    if step.days == 1 and known[-1] - known[0] >= pd.Timedelta(days=7) and (known.dayofweek < 5).all():
        return "B"
    if step.days == 7:
        return f"W-{known[0].day_name()[:3].upper()}"
    return CALENDAR_DAYS.get(step.days, f"{step.days}D")


@quiet_periods()
def resampled(frame: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Means over coarser periods of what is not missing, each row counting where it starts."""
    if not isinstance(frame.index, pd.PeriodIndex):
        raise ValueError(f"`resample` is {freq!r}, but the series have no time stamps: leave it out.")
    name, own = period_freq(freq), period_freq(frame.index.freqstr)
    if name == own:
        return frame
    if _span(name) <= _span(own):
        raise ValueError(f"`resample` is {freq!r}, which is not coarser than the series' own {own!r}: leave it out.")
    coarse = frame.index.asfreq(name, how="start")
    positions = coarse.astype("int64").to_numpy()
    groups = (positions - positions[0]) // coarse.freq.n
    means = frame.groupby(groups).mean()
    return means.set_axis(pd.period_range(coarse[0], periods=len(means)), axis=0)


def _span(freq: str) -> pd.Timedelta:
    """How long a period lasts, about, from a Monday on."""
    period = pd.Period("2000-01-03", freq)
    return (period + 1).start_time - period.start_time


def rolling_windows(
    frame: pd.DataFrame, prediction_length: int, num_windows: int
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """The end of a frame in consecutive windows, each with all that came before it.

    Args:
        frame (`pd.DataFrame`): `(T, d)`, as of [`regular_frame`].
        prediction_length (`int`): Rows L of a window.
        num_windows (`int`): How many windows n there are: they cover the last `n L` rows.

    Returns:
        A list of (the rows before the window, the window `(L, d)`), in order of time.

    Raises:
        ValueError: A number is not positive, or no row is left before the first window.
    """
    for name, value in (("prediction_length", prediction_length), ("num_windows", num_windows)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"`{name}` must be a whole number from 1 up, got {value!r}.")
    first = len(frame) - prediction_length * num_windows
    if first < 1:
        raise ValueError(
            f"`frame` has {len(frame)} rows, too few for {num_windows} windows of {prediction_length} and a row before"
            " them: take fewer or shorter windows."
        )
    starts = range(first, len(frame), prediction_length)
    return [(frame.iloc[:start], frame.iloc[start : start + prediction_length]) for start in starts]


# --- what stands for a frame

ACCEPTED = (
    "a NumPy array (T, d), a pandas DataFrame or Series, or a GluonTS entry (a dictionary with `target`, (d, T), and"
    " `start`), or a list or GluonTS data set of these, or an array (windows, T, d)"
)


def frames_of(history: Any, freq: str | None = None) -> tuple[list[pd.DataFrame], bool]:
    """Regular frames of whatever stands for one history or for several.

    Args:
        history: A NumPy array `(T, d)`, a pandas DataFrame `(T, d)` or Series, or a GluonTS entry with a `target` of
            `(d, T)` and a `pd.Period` as `start`; or a list, a GluonTS data set or another iterable of these; or an
            array `(windows, T, d)`. Arrays get a `RangeIndex` and, as entries do, the names `series_0`, `series_1` and
            so on.
        freq (`str`, *optional*): The step of frames and entries, see [`regular_frame`]. Arrays have no clock.

    Returns:
        The frames, and whether there was a single history, not a list of them.

    Raises:
        ValueError: An array has no axis of series, an entry lacks a part, the list is empty, or a frame is not
            regular.
        TypeError: It is something else.
    """
    if isinstance(history, np.ndarray) and history.ndim == 3:
        history = list(history)
    if isinstance(history, tuple(FRAME_OF)):
        return [_frame_of(history, freq)], True
    if isinstance(history, str | bytes) or not isinstance(history, Iterable):
        raise TypeError(f"`history` must be {ACCEPTED}, got {type(history).__name__}.")
    frames = [_frame_of(item, freq) for item in history]
    if not frames:
        raise ValueError(f"`history` is an empty {type(history).__name__}: give at least one history.")
    return frames, False


def _frame_of(item: Any, freq: str | None) -> pd.DataFrame:
    for kind, convert in FRAME_OF.items():
        if isinstance(item, kind):
            return convert(item, freq)
    raise TypeError(f"`history` must be {ACCEPTED}, got a list with {type(item).__name__}.")


def _frame_of_array(array: np.ndarray, freq: str | None) -> pd.DataFrame:
    if array.ndim != 2:
        raise ValueError(
            f"`history` has the shape {array.shape}, and (time, series) is needed: reshape a single series to (T, 1)."
        )
    return regular_frame(pd.DataFrame(array, columns=numbered("series", array.shape[1])))


def _frame_of_series(series: pd.Series, freq: str | None) -> pd.DataFrame:
    return regular_frame(series.to_frame("series_0" if series.name is None else series.name), freq)


@quiet_periods()
def _frame_of_entry(entry: Mapping, freq: str | None) -> pd.DataFrame:
    missing = [name for name in ("target", "start") if name not in entry]
    if missing:
        raise ValueError(f"`history` is a dictionary without {missing}: a GluonTS entry has `target` and `start`.")
    start, target = entry["start"], np.asarray(entry["target"])
    if not isinstance(start, pd.Period):
        raise TypeError(f"`start` of an entry must be a pd.Period, got {start!r}: give `pd.Period(start, freq)`.")
    if target.ndim != 2:
        raise ValueError(
            f"`target` of an entry has the shape {target.shape}, and (series, time) is needed: reshape a single series"
            " to (1, T), or make the data set with `one_dim_target=False`."
        )
    index = pd.period_range(start, periods=target.shape[1])
    return regular_frame(pd.DataFrame(target.T, index, numbered("series", len(target))), freq)


FRAME_OF: dict[type, Callable[[Any, str | None], pd.DataFrame]] = {
    np.ndarray: _frame_of_array,
    pd.DataFrame: regular_frame,
    pd.Series: _frame_of_series,
    Mapping: _frame_of_entry,
}


@quiet_periods()
def as_gluonts_entries(frames: Iterable[pd.DataFrame]) -> list[dict[str, Any]]:
    """Regular frames as entries of a GluonTS data set.

    Args:
        frames: Frames `(T, d)`, as of [`regular_frame`].

    Returns:
        For each frame a dictionary: `target`, `(d, T)` of float32; `start`, a `pd.Period`, which for a `RangeIndex`
        is a stand-in, as many days after 2000-01-01 as it starts at; and `item_id`, the frame's number as text.

    Raises:
        TypeError: An index is neither a `PeriodIndex` nor a `RangeIndex`.
    """
    return [
        {
            "target": np.ascontiguousarray(frame.to_numpy(np.float32).T),
            "start": _start(frame.index),
            "item_id": str(number),
        }
        for number, frame in enumerate(frames)
    ]


def _start(index: pd.Index) -> pd.Period:
    if isinstance(index, pd.PeriodIndex):
        return index[0]
    if isinstance(index, pd.RangeIndex):
        return pd.Period(*STAND_IN) + index.start
    raise TypeError(
        f"The index of a frame is a {type(index).__name__}, not a PeriodIndex or RangeIndex: make it regular with"
        " `regular_frame` first."
    )


def numbered(stem: str, size: int) -> list[str]:
    """Names of series that have none."""
    return [f"{stem}_{number}" for number in range(size)]
