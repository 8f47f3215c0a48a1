"""The numbers of a sampling run: made once in double precision, cast, and read call by call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import process
from ..solvers import Solver
from .parameterization import Parameterization


# the "log" spellings of Diffusers mean the same standard deviation
FIXED_LARGE = ("fixed_large", "fixed_large_log")
LEARNED = ("learned", "learned_range")
# None is what other classes save that have no such choice
VARIANCE_TYPES = (None, "fixed_small", "fixed_small_log", *FIXED_LARGE, *LEARNED)


# a Python number where it is the same for all dimensions: it needs no transfer, and no pass of its own
Row = dict[str, float | Tensor]


@dataclass(frozen=True)
class Call:
    """The numbers of one network call.

    Attributes:
        x0, eps: Coefficients of `sample` and `output` in the predicted data and noise; `eps` is empty if unused.
        velocity: Coefficients of `x0`, `sample` and `mean` in the predicted velocity; empty if unused.
        terms: The solver's coefficients by name, see [`Coefficients`]; terms that are 0 are left out, but for noise.
        hold: The same for what is to be held; empty where nothing is.
        log_variance: Logarithms of the least and the largest variance of the `ddpm` solver, for learned variances.
        is_defined: Whether all of these are finite and leave a prediction of the noise something to say.
    """

    x0: Row
    eps: Row
    velocity: Row
    terms: Row
    hold: Row
    log_variance: tuple[float | Tensor, float | Tensor]
    is_defined: bool

    @property
    def extrapolated(self) -> str:
        """Which prediction a multistep solver keeps."""
        return "velocity" if self.velocity else "eps" if self.eps else "x0"


def make_calls(
    solver: Solver,
    order: int,
    network: Parameterization,
    lam: Tensor,
    g: Tensor,
    scale: Tensor,
    data_variance: Tensor,
    variance_type: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Call]:
    """The calls of a run of n steps.

    Args:
        solver, order: A row of `SOLVERS`, and which of its rules.
        network: What is predicted.
        lam, g, scale: Of the process at the n + 1 times between steps, in float64; see [`DiscreteProcess`].
        data_variance: Of each dimension, a scalar if lambda is one; for solvers that use it.
        variance_type: As in `DDPMScheduler`; for solvers that sample the posterior.
        device, dtype: Of the samples.
    """
    limits = torch.finfo(dtype)

    def place(table: Tensor) -> list[Any]:
        table = table.clamp(-limits.max, limits.max)
        return table.tolist() if table.ndim == 1 else list(table.to(device, dtype).unbind(0))

    def rows(columns: dict[str, Tensor]) -> list[Row]:
        kept = {name: (place(c), (c != 0).reshape(len(c), -1).any(1).tolist()) for name, c in columns.items()}
        return [
            {name: values[i] for name, (values, some) in kept.items() if some[i] or name == "noise"}
            for i in range(len(a))
        ]

    calls = solver.calls_per_step
    g, g_next = g[:-1], g[1:]
    at_call, at_end = g.repeat_interleave(calls, 0)[calls - 1 :], g_next.repeat_interleave(calls, 0)
    here, there = scale[:-1].repeat_interleave(calls, 0)[calls - 1 :], scale[1:].repeat_interleave(calls, 0)
    at_end, there = at_end[: len(at_call)], there[: len(at_call)]
    a, s = here * process.mean_scale(lam, at_call), here * process.std(lam, at_call)
    moments = (data_variance,) if solver.uses_moments else ()
    coefficients = solver.rule(order).coefficients(lam, g, g_next, *moments)
    # a solver steps x / scale, and what it holds is in those units
    terms, hold, velocity = (
        {name: column / here if name == "sample" else column for name, column in (c.columns() if c else {}).items()}
        for c in (coefficients, coefficients.hold, coefficients.velocity_terms)
    )
    terms = {name: there * column for name, column in terms.items()}
    small = there**2 * process.posterior(lam, at_call, at_end)[2]
    small = small.clamp(min=1e-20)  # Diffusers' floor, for its logarithm
    large = there**2 * process.variance(lam, at_call - at_end)
    if solver.samples_posterior and variance_type in FIXED_LARGE:
        terms["noise"] = large.sqrt()
    x0, eps = (dict(zip(("sample", "output"), f(a, s), strict=True)) for f in (network.x0_terms, network.eps_terms))

    # the data may be a large multiple of the sample: leave room for a network's error in the working precision
    numbers = [s, *terms.values(), *hold.values(), *velocity.values(), *(eps.values() if "eps" in terms else [])]
    checks = [table.abs() < limits.max for table in numbers]
    checks += [table.abs() < 1e-6 / limits.tiny for table in x0.values()] if "x0" in terms or velocity else []
    defined = torch.stack([check.reshape(len(a), -1).all(1) for check in checks]).all(0)
    columns = (
        rows(x0),
        rows(eps) if "eps" in terms else [{}] * len(a),
        rows(velocity) if velocity else [{}] * len(a),
        rows(terms),
        rows(hold),
        list(zip(place(small.log()), place(large.log()), strict=True)),
        defined.tolist(),
    )
    return [Call(*numbers) for numbers in zip(*columns, strict=True)]


def combine(terms: Row, values: dict[str, Tensor]) -> Tensor:
    """The sum of the terms whose values there are; every row of a solver has one."""
    (coefficient, value), *others = ((c, values[name]) for name, c in terms.items() if name in values)
    total = value * coefficient
    for coefficient, value in others:
        if isinstance(coefficient, Tensor):
            total.addcmul_(value, coefficient)
        else:
            total.add_(value, alpha=coefficient)
    return total


def learned_std(variance_type: str, predicted: Tensor, log_small: float | Tensor, log_large: float | Tensor) -> Tensor:
    """Standard deviation from a network's second half of channels (Nichol and Dhariwal 2021, Eq. 15)."""
    if variance_type == "learned":
        return predicted.sqrt()
    weight = (predicted + 1) / 2
    return torch.exp(0.5 * (weight * log_large + (1 - weight) * log_small))


def clipped(x0: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The predicted data by dynamic thresholding (Saharia et al. 2022, section 2.3), or else statically clipped."""
    if not config["thresholding"]:
        return x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
    quantile = torch.quantile(x0.abs().flatten(1).float(), config["dynamic_thresholding_ratio"], dim=1)
    bound = quantile.clamp(1, config["sample_max_value"]).reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return x0.clamp(-bound, bound) / bound
