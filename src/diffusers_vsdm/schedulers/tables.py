"""The numbers of a sampling run: made once in double precision, cast, and read row by row."""

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import process
from ..solvers import Solver


# the "log" spellings of Diffusers mean the same standard deviation
FIXED_LARGE = ("fixed_large", "fixed_large_log")
LEARNED = ("learned", "learned_range")
# None is what other classes save that have no such choice
VARIANCE_TYPES = (None, "fixed_small", "fixed_small_log", *FIXED_LARGE, *LEARNED)


Row = dict[str, Tensor]


@dataclass(frozen=True)
class StepTables:
    """One entry for each network call of a run.

    Attributes:
        a, s: The scales of the process at the call's time.
        terms: The solver's coefficients by name, see [`Coefficients`]; terms that are 0 are left out, but for noise.
        hold: The same for what is to be held; empty where nothing is.
        uses_noise: Whether any term is of the predicted noise.
        log_variance: Logarithms of the least and the largest variance of the `ddpm` solver, for learned variances.
        is_defined: Whether the step's numbers are finite and leave a prediction of the noise something to say.
    """

    a: list[Tensor]
    s: list[Tensor]
    terms: list[Row]
    hold: list[Row]
    uses_noise: bool
    log_variance: tuple[list[Tensor], list[Tensor]]
    is_defined: list[bool]


def make_tables(
    solver: Solver,
    order: int,
    lam: Tensor,
    g: Tensor,
    g_next: Tensor,
    variance_type: str | None,
    predicts_noise: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> StepTables:
    """The tables of a run of n steps.

    Args:
        solver, order: A row of `SOLVERS`, and which of its rules.
        lam: Lambda in float64: a scalar, or shaped as the drift's.
        g, g_next: The integrated beta before and after each step, `(n, 1, ..., 1)` in float64.
        variance_type: As in `DDPMScheduler`; for solvers that sample the posterior.
        predicts_noise: Whether the data must be found from a predicted noise or score.
        device, dtype: Of the samples. Scalars stay on the CPU, where they need no transfer.
    """

    def place(table: Tensor) -> list[Tensor]:
        return list((table.to(dtype) if table.ndim == 1 else table.to(device, dtype)).unbind(0))

    def rows(columns: dict[str, Tensor]) -> list[Row]:
        kept = {name: (place(c), (c != 0).reshape(len(c), -1).any(1).tolist()) for name, c in columns.items()}
        return [
            {name: values[i] for name, (values, some) in kept.items() if some[i] or name == "noise"}
            for i in range(len(a))
        ]

    calls = solver.calls_per_step
    at_call = g.repeat_interleave(calls, 0)[calls - 1 :]
    a, s = process.mean_scale(lam, at_call), process.std(lam, at_call)
    coefficients = solver.rule(order).coefficients(lam, g, g_next)
    terms = coefficients.columns()
    hold = coefficients.hold.columns() if coefficients.hold else {}
    small = process.posterior(lam, g, g_next)[2].clamp(min=1e-20)  # Diffusers' floor, for its logarithm
    large = process.variance(lam, g - g_next)
    if solver.samples_posterior and variance_type in FIXED_LARGE:
        terms["noise"] = large.sqrt()

    numbers = (s, *terms.values(), *hold.values())
    defined = torch.stack([torch.isfinite(table).reshape(len(a), -1).all(1) for table in numbers]).all(0)
    if predicts_noise and "x0" in terms:
        # the data is (x - s eps) / a: leave room for a network's error in the working precision
        defined = defined & (a > 1e6 * torch.finfo(dtype).tiny).reshape(len(a), -1).all(1)
    return StepTables(
        a=place(a),
        s=place(s),
        terms=rows(terms),
        hold=rows(hold),
        uses_noise=coefficients.eps is not None,
        log_variance=(place(small.log()), place(large.log())),
        is_defined=defined.tolist(),
    )


def combine(terms: Row, values: Row) -> Tensor:
    """The sum of the terms whose values there are."""
    return functools.reduce(operator.add, (terms[name] * values[name] for name in terms if name in values))


def learned_std(variance_type: str, predicted: Tensor, log_small: Tensor, log_large: Tensor) -> Tensor:
    """Standard deviation from a network's second half of channels (Nichol and Dhariwal 2021, Eq. 15)."""
    if variance_type == "learned":
        return predicted.sqrt()
    weight = (predicted + 1) / 2
    return torch.exp(0.5 * (weight * log_large + (1 - weight) * log_small))
