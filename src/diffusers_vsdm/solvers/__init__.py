r"""Solvers for Eq. 17 and 18, each one entry of [`SOLVERS`].

A solver turns a grid of times into coefficients, once; a step is then the same multiply-and-add for all of them: of
the sample, of the network's predictions now and at earlier calls, of what was held, and of noise. See
[`Coefficients`]. Schedulers, tests and benchmarks take their list of solvers from the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from .coefficients import Coefficients
from .exponential import deis, dpmsolver_pp, ipndm, sde_dpmsolver_pp, unipc
from .fitted import trig_fitted
from .single_step import ddim, ddpm, euler, euler_maruyama, heun
from .trigonometric import trig


@dataclass(frozen=True)
class Rule:
    """How a solver makes its coefficients.

    Attributes:
        coefficients: `(lam, g, g_next)` to [`Coefficients`]. `g` and `g_next` hold the integrated beta before and
            after each of the n steps, shaped `(n, 1, ..., 1)` to broadcast against lambda. A solver that
            `uses_moments` also takes the data's variance, shaped as lambda or to broadcast against it.
        order: Order of convergence: of the ODE, or in law where stochastic. That of a multistep rule is reached once
            its history is full; its first steps have lower ones.
    """

    coefficients: Callable[..., Coefficients]
    order: int
    history: int = 0


@dataclass(frozen=True)
class Solver:
    """A row of [`SOLVERS`].

    Attributes:
        rules: By `solver_order`.
        time_grid: The time grid where none is given.
        calls_per_step: Network calls for one step of the grid.
        multistep: Whether a step uses what earlier steps left, so that a run must be taken in its order.
        stochastic: Whether the step draws noise.
        samples_posterior: Whether that noise is the posterior's, whose variance may be chosen or learned.
        uses_moments: Whether the data's mean and variance enter.
    """

    rules: Mapping[int, Rule]
    time_grid: str = "spacing"
    calls_per_step: int = 1
    multistep: bool = False
    stochastic: bool = False
    samples_posterior: bool = False
    uses_moments: bool = False

    def rule(self, solver_order: int) -> Rule:
        """The rule for this `solver_order`, or the only one that there is.

        Raises:
            ValueError: There are several, and none for this one.
        """
        if len(self.rules) == 1:
            return next(iter(self.rules.values()))
        if solver_order not in self.rules:
            raise ValueError(
                f"`solver_order` must be one of {tuple(self.rules)} for this solver, got {solver_order!r}."
            )
        return self.rules[solver_order]


def _one(function: Callable[..., Coefficients], order: int) -> dict[int, Rule]:
    return {order: Rule(function, order)}


def _several(function: Callable[..., Coefficients], *orders: int, corrects: bool = False) -> dict[int, Rule]:
    """Rules for `solver_order` 1, 2, ... that converge with these orders; a corrector looks one call further back."""
    return {n: Rule(partial(function, order=n), order, n - 1 + corrects) for n, order in enumerate(orders, 1)}


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(_one(ddpm, 1), stochastic=True, samples_posterior=True),
    "ddim": Solver(_one(ddim, 1)),
    "euler": Solver(_one(euler, 1)),
    "heun": Solver(_one(heun, 2), calls_per_step=2),
    "euler-maruyama": Solver(_one(euler_maruyama, 1), stochastic=True),
    "dpmsolver++": Solver(_several(dpmsolver_pp, 1, 2, 3), multistep=True),
    "sde-dpmsolver++": Solver(_several(sde_dpmsolver_pp, 1, 2), multistep=True, stochastic=True),
    "unipc": Solver(_several(unipc, 2, 3, 4, corrects=True), multistep=True),
    "deis": Solver(_several(deis, 1, 2, 3, 4), multistep=True),
    # the weights of equal steps on other grids: more steps of history do not give more order
    "ipndm": Solver(_several(ipndm, 1, 2, 2, 2), multistep=True),
    "trig": Solver({3: Rule(trig, order=3, history=2)}, time_grid="quadratic", multistep=True, uses_moments=True),
    "trig-fitted": Solver(
        {3: Rule(trig_fitted, order=2, history=3)}, time_grid="quadratic", multistep=True, uses_moments=True
    ),
}

__all__ = ["SOLVERS", "Coefficients", "Rule", "Solver"]
