"""Time grids: which training times a sampling run visits.

Index k of N training times means t = (k + 1) / N, and k = -1 is the data.

References:
    Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps are Flawed", Table 2.
"""

from collections.abc import Callable

import numpy as np


SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "leading": lambda n, train, offset: np.arange(n)[::-1] * (train // n) + offset,
    "linspace": lambda n, train, offset: np.linspace(0, train - 1, n)[::-1].round(),
    "trailing": lambda n, train, offset: np.arange(train, 0, -train / n)[:n].round() - 1,
}


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
    if timesteps.ndim != 1 or (timesteps != np.floor(timesteps)).any():
        raise ValueError(f"`timesteps` must be a list of whole training timesteps, got {timesteps.tolist()}.")
    grid = np.append(timesteps.astype(np.int64), -1 if to_data else 0)
    if (np.diff(grid) >= 0).any():
        raise ValueError(
            f"`timesteps` must be in descending order and end above {grid[-1]}, got {timesteps.tolist()}."
        )
    if grid[0] >= num_train:
        raise ValueError(f"`timesteps` must lie below the {num_train} training timesteps, got {timesteps.tolist()}.")
    return grid
