r"""What a network may predict, and how each prediction gives the data $x_0$ and the noise $\epsilon$.

In $x = a x_0 + s \epsilon$ there are an $a$ and an $s$ per dimension, and $a^2 + s^2 = 1$ holds at $\lambda = 1$ only.

References:
    Salimans, Ho (2022), "Progressive Distillation for Fast Sampling of Diffusion Models": v = a eps - s x0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Parameterization:
    r"""A row of [`PARAMETERIZATIONS`]; all is elementwise, and linear in the sample and in the network's output.

    Attributes:
        x0_terms: `(a, s)` to the coefficients of sample and output in the predicted data.
        eps_terms: The same for the predicted noise.
        target: `(x0, eps, a, s)` to what the network should output.
    """

    x0_terms: Terms
    eps_terms: Terms
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def x0(self, output: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The predicted data."""
        on_x, on_output = self.x0_terms(a, s)
        return on_x * x + on_output * output

    def eps(self, output: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The predicted noise."""
        on_x, on_output = self.eps_terms(a, s)
        return on_x * x + on_output * output


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Parameterization(
        x0_terms=lambda a, s: (1 / a, -s / a),
        eps_terms=lambda a, s: (torch.zeros_like(s), torch.ones_like(s)),
        target=lambda x0, eps, a, s: eps,
    ),
    "sample": Parameterization(
        x0_terms=lambda a, s: (torch.zeros_like(s), torch.ones_like(s)),
        eps_terms=lambda a, s: (1 / s, -a / s),
        target=lambda x0, eps, a, s: x0,
    ),
    "v_prediction": Parameterization(
        x0_terms=lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2)),
        eps_terms=lambda a, s: (s / (a**2 + s**2), a / (a**2 + s**2)),
        target=lambda x0, eps, a, s: a * eps - s * x0,
    ),
    "score": Parameterization(
        x0_terms=lambda a, s: (1 / a, s**2 / a),
        eps_terms=lambda a, s: (torch.zeros_like(s), -s),
        target=lambda x0, eps, a, s: -eps / s,
    ),
}
