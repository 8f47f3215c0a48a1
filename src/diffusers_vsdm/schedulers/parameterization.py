r"""What a network may predict, and how each prediction gives the data $x_0$ and the noise $\epsilon$.

In $x = a x_0 + s \epsilon$ there are an $a$ and an $s$ per dimension, and $a^2 + s^2 = 1$ holds at $\lambda = 1$ only.

`edm` is the preconditioning of Karras et al. with a noise level and a power of the data $p = E x_0^2$ for each
dimension. Divided by $n = \sqrt{a^2 p + s^2}$ the sample has power 1, which is the network's input; its output F is
what is not in the sample of $x_0$ and $\epsilon$, of power 1 too:
$$x_0 = \frac{a p}{n^2} x + \frac{s \sqrt p}{n} F, \qquad F = \frac{s}{n \sqrt p} x_0 - \frac{a \sqrt p}{n} \epsilon.$$
Its loss with weight 1 is that of Karras et al., whose weighting gives every noise level the same.

References:
    Salimans, Ho (2022), "Progressive Distillation for Fast Sampling of Diffusion Models": v = a eps - s x0.
    Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", Table 1, appendix B.6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

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
        input_scale: `(a, s)` to what the sample is multiplied by for the network; None where it is not.
    """

    x0_terms: Terms
    eps_terms: Terms
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    input_scale: Callable[[Tensor, Tensor], Tensor] | None = None

    def x0(self, output: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The predicted data."""
        on_x, on_output = self.x0_terms(a, s)
        return on_x * x + on_output * output

    def eps(self, output: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The predicted noise."""
        on_x, on_output = self.eps_terms(a, s)
        return on_x * x + on_output * output


SIGMA_DATA = 0.5  # of images in [-1, 1], by Karras et al.


def edm(power: Tensor | float = SIGMA_DATA**2) -> Parameterization:
    """The preconditioning of Karras et al.

    Args:
        power: $E x_0^2$ of every dimension, of the event's shape in the process's basis, or one number for all. Where
            it is 0 the data are known, and the network is not asked.
    """

    @lru_cache
    def cast(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p = torch.as_tensor(power, dtype=torch.float64)
        return p.to(device, dtype), p.sqrt().to(device, dtype)

    def numbers(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, sigma = cast(s.device, s.dtype)
        return p, sigma, (a**2 * p + s**2).sqrt()

    def x0_terms(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        p, sigma, n = numbers(a, s)
        return a * p / n**2, s * sigma / n

    def eps_terms(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma, n = numbers(a, s)
        return s / n**2, -a * sigma / n

    def target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        _, sigma, n = numbers(a, s)
        return (s * torch.where(sigma > 0, x0 / sigma, 0) - a * sigma * eps) / n

    def input_scale(a: Tensor, s: Tensor) -> Tensor:
        return 1 / numbers(a, s)[2]

    return Parameterization(x0_terms, eps_terms, target, input_scale)


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
    "edm": edm(),
}
