r"""What a network may predict, and how each prediction gives the data $x_0$ and the noise $\epsilon$.

In $x = a x_0 + s \epsilon$ there are an $a$ and an $s$ per dimension, and $a^2 + s^2 = 1$ holds at $\lambda = 1$ only.

References:
    Salimans, Ho (2022), "Progressive Distillation for Fast Sampling of Diffusion Models": v = a eps - s x0.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parameterization:
    r"""A row of [`PARAMETERIZATIONS`]; all functions are elementwise.

    Attributes:
        x0: `(output, x, a, s)` to the predicted data.
        eps: `(output, x, a, s)` to the predicted noise.
        target: `(x0, eps, a, s)` to what the network should output.
        eps_per_unit: `(a, s)` to the error in eps that a unit error of the output makes.
    """

    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    eps: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    eps_per_unit: Callable[[Tensor, Tensor], Tensor]


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Parameterization(
        x0=lambda output, x, a, s: (x - s * output) / a,
        eps=lambda output, x, a, s: output,
        target=lambda x0, eps, a, s: eps,
        eps_per_unit=lambda a, s: s / s,
    ),
    "sample": Parameterization(
        x0=lambda output, x, a, s: output,
        eps=lambda output, x, a, s: (x - a * output) / s,
        target=lambda x0, eps, a, s: x0,
        eps_per_unit=lambda a, s: a / s,
    ),
    "v_prediction": Parameterization(
        x0=lambda output, x, a, s: (a * x - s * output) / (a**2 + s**2),
        eps=lambda output, x, a, s: (s * x + a * output) / (a**2 + s**2),
        target=lambda x0, eps, a, s: a * eps - s * x0,
        eps_per_unit=lambda a, s: a / (a**2 + s**2),
    ),
    "score": Parameterization(
        x0=lambda output, x, a, s: (x + s**2 * output) / a,
        eps=lambda output, x, a, s: -s * output,
        target=lambda x0, eps, a, s: -eps / s,
        eps_per_unit=lambda a, s: s,
    ),
}
