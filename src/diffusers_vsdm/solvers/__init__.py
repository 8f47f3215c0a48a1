r"""Solvers for Eq. 17 and 18, each one entry of [`SOLVERS`].

A solver turns a grid of times into coefficients, once; a step is then the same multiply-and-add for all of them,

    next = sample * x + x0 * x0_hat + eps * eps_hat + held * x_held + noise * xi

where a coefficient of None stands for an absent term. Schedulers, tests and benchmarks take their list of solvers from
the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .single_step import Coefficients, ddim, ddpm, euler, euler_maruyama, heun


@dataclass(frozen=True)
class Solver:
    """A row of [`SOLVERS`].

    Attributes:
        coefficients: `(lam, g, g_next)` to [`Coefficients`], one row for each network call. `g` and `g_next` hold the
            integrated beta before and after each of the n steps, shaped `(n, 1, ..., 1)` to broadcast against lambda.
        order: Global order of convergence: of the ODE, or strong order (additive noise) where stochastic.
        calls_per_step: Network calls for one step of the grid.
        stochastic: Whether the step draws noise.
        samples_posterior: Whether that noise is the posterior's, whose variance may be chosen or learned.
    """

    coefficients: Callable[[Tensor, Tensor, Tensor], Coefficients]
    order: int
    calls_per_step: int = 1
    stochastic: bool = False
    samples_posterior: bool = False


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, order=1, stochastic=True, samples_posterior=True),
    "ddim": Solver(ddim, order=1),
    "euler": Solver(euler, order=1),
    "heun": Solver(heun, order=2, calls_per_step=2),
    "euler-maruyama": Solver(euler_maruyama, order=1, stochastic=True),
}

__all__ = ["SOLVERS", "Coefficients", "Solver"]
