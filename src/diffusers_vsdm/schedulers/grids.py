r"""Time grids: which training times a sampling run visits.

Index k of N training times means t = (k + 1) / N, and k = -1 is the data. Between two training times a fractional k
stands for the time whose $\log g$ lies between theirs.

References:
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", Eq. 5.
    Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps are Flawed", Table 2.
    Lu et al. (2022), "DPM-Solver": steps uniform in the log-SNR.
"""

from collections.abc import Callable

import numpy as np


SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "leading": lambda n, train, offset: np.arange(n)[::-1] * (train // n) + offset,
    "linspace": lambda n, train, offset: np.linspace(0, train - 1, n)[::-1].round(),
    "trailing": lambda n, train, offset: np.arange(train, 0, -train / n)[:n].round() - 1,
}


KARRAS_POWER = 7.0


def _karras(u: np.ndarray, log_sigma: np.ndarray) -> np.ndarray:
    most, least = (np.exp(log_sigma[i] / KARRAS_POWER) for i in (-1, 0))
    return KARRAS_POWER * np.log(most + u * (least - most))


def _uniform(u: np.ndarray, log_sigma: np.ndarray) -> np.ndarray:
    return log_sigma[-1] + u * (log_sigma[0] - log_sigma[-1])


# from u, 0 at the first and 1 at the last time, and a table of log(s/a) to the log(s/a) of a grid
CLOCKS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "karras": _karras,
    "log_snr_mean": _uniform,
    "log_snr_largest": _uniform,
    "log_snr_smallest": _uniform,
}
TIME_GRIDS = ("spacing", "quadratic", *CLOCKS)


def continuous_grid(kind: str, num_steps: int, log_sigma: np.ndarray, to_data: bool) -> np.ndarray:
    """As [`inference_grid`], of fractional times; the last network call is at k = 0, but for `"quadratic"`.

    Args:
        kind: `"quadratic"`, uniform in the root of k, or a key of [`CLOCKS`].
        num_steps: Steps.
        log_sigma: `log(s/a)` at the training times, increasing, `(N,)`: one number for all dimensions.
        to_data: Whether the last step ends at the data.

    Raises:
        ValueError: Less than one step, or a table without a finite end (zero terminal SNR).
    """
    last = len(log_sigma) - 1
    if num_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, got {num_steps}.")
    if kind == "quadratic":
        times = last * np.linspace(1, 0, num_steps + 1) ** 2
        times = times[:-1] if to_data else times
    else:
        if not np.isfinite(log_sigma).all():
            raise ValueError(f"`time_grid` {kind!r} needs a signal at every time: this table has none at its last.")
        u = np.linspace(0, 1, num_steps if to_data else num_steps + 1)
        times = np.interp(CLOCKS[kind](u, log_sigma), log_sigma, np.arange(last + 1))
        times[-1], times[0] = 0, last  # to the last bit
    # as the network will be told them
    return np.append(times.astype(np.float32).astype(np.float64), [-1] if to_data else [])


def inference_grid(num_steps: int, num_train: int, spacing: str, offset: int, to_data: bool) -> np.ndarray:
    """Training times from noise to data, falling, shape `(num_steps + 1,)` of int64.

    The last entry is where the last step arrives: k = -1 if `to_data`, else k = 0.

    Args:
        num_steps: Steps, at most `num_train` (one less if not `to_data`).
        num_train: Training times N.
        spacing: Key of [`SPACINGS`].
        offset: Added to all times, for `"leading"`.
        to_data: Whether the last step ends at the data.

    Raises:
        ValueError: Too many steps or none, or an offset past the table.
    """
    most = num_train if to_data else num_train - 1
    if not 1 <= num_steps <= most:
        raise ValueError(
            f"`num_inference_steps` must lie between 1 and {most} for {num_train} training timesteps, got {num_steps}."
        )
    times = SPACINGS[spacing](num_steps if to_data else num_steps + 1, num_train, offset).astype(np.int64)
    if times[0] >= num_train:
        raise ValueError(f"`steps_offset` {offset} leads past the last of {num_train} training timesteps: lower it.")
    if to_data:
        return np.append(times, -1)
    times[-1] = 0
    return times


def custom_grid(timesteps: np.ndarray, num_train: int, to_data: bool) -> np.ndarray:
    """As [`inference_grid`], for times that the user gives.

    Raises:
        ValueError: The times do not fall, or lie outside the table.
    """
    if len(timesteps) == 0:
        raise ValueError("`timesteps` is empty: give at least one training timestep.")
    if timesteps.ndim != 1 or not np.isfinite(timesteps).all():
        raise ValueError(f"`timesteps` must be a list of training timesteps, got {timesteps.tolist()}.")
    whole = (timesteps == np.floor(timesteps)).all()
    times = timesteps.astype(np.int64) if whole else timesteps.astype(np.float32).astype(np.float64)
    grid = np.append(times, -1 if to_data else 0)
    if (np.diff(grid) >= 0).any():
        raise ValueError(
            f"`timesteps` must be in descending order and end above {grid[-1]}, got {timesteps.tolist()}."
        )
    if timesteps[0] > num_train - 1 or timesteps[-1] < 0:
        raise ValueError(f"`timesteps` must lie in 0 to {num_train - 1}, got {timesteps.tolist()}.")
    return grid
