"""What a solver is to a scheduler: the coefficients of a linear combination."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    r"""Coefficients of a step's terms: each None, or a row for each network call, `(calls, *lambda_shape)`.

    Attributes:
        sample: Of the sample that the network was called with.
        held: Of what `hold` made at the call before.
        x0, x0_1, x0_2, x0_3: Of the predicted data, after clipping, and of the predictions of earlier calls.
        eps, eps_1, eps_2, eps_3: Of the predicted noise, and of earlier ones.
        velocity, velocity_1, velocity_2, velocity_3: Of the predicted velocity, and of earlier ones.
        noise: Of fresh standard normal noise.
        mean: Of the data's mean.
        hold: The same for what is to be held for the next call; None if nothing is.
        velocity_terms: The same for the velocity itself, of `x0`, `sample` and `mean`; None if it is not used.
    """

    sample: Tensor | None = None
    held: Tensor | None = None
    x0: Tensor | None = None
    x0_1: Tensor | None = None
    x0_2: Tensor | None = None
    x0_3: Tensor | None = None
    eps: Tensor | None = None
    eps_1: Tensor | None = None
    eps_2: Tensor | None = None
    eps_3: Tensor | None = None
    velocity: Tensor | None = None
    velocity_1: Tensor | None = None
    velocity_2: Tensor | None = None
    velocity_3: Tensor | None = None
    noise: Tensor | None = None
    mean: Tensor | None = None
    hold: Coefficients | None = None
    velocity_terms: Coefficients | None = None

    def columns(self) -> dict[str, Tensor]:
        """The terms that there are, by name."""
        return {name: column for name, column in vars(self).items() if isinstance(column, Tensor)}
