r"""Multistep solvers that integrate the linear part of Eq. 18 exactly, as coefficients, elementwise in $\lambda$.

With $l = \log(a/s)$ and $\sigma = s/a$, a vector with one entry for each dimension, the flow is

$$ x_r = \frac{s_r}{s_t} x_t + a_r \int_{l_t}^{l_r} e^{l - l_r} \hat x_0 \, dl
       = \frac{a_r}{a_t} x_t + a_r \int_{\sigma_t}^{\sigma_r} \hat\epsilon \, d\sigma , $$

and a solver replaces the prediction by a polynomial through its last values. Only differences of $l$ and $\sigma$
enter, so any $\lambda \ge 0$ is as good as $\lambda = 1$, where these are the solvers known by the same names.

References:
    Lu et al. (2022), "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models".
    Zhao et al. (2023), "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models".
    Zhang, Chen (2023), "Fast Sampling of Diffusion Models with Exponential Integrator" (DEIS).
    Zhang, Chen (2023), as above, and Liu et al. (2022), "Pseudo Numerical Methods for Diffusion Models on Manifolds":
        the fixed Adams-Bashforth weights of `ipndm`.
    Björck, Pereyra (1970), "Solution of Vandermonde Systems of Equations", Mathematics of Computation.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import process
from .coefficients import Coefficients


FEW_STEPS = 15  # runs shorter than this end with lower orders, as in Diffusers
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
# least a / s at which a prediction in float32 says anything of the data: its rounding is multiplied by s / a
LEAST_SIGNAL = 1e-6
# terms of the Taylor series of the moments below, enough for double precision at h <= 1
SERIES = 18


def dpmsolver_pp(lam: Tensor, g: Tensor, g_next: Tensor, order: int) -> Coefficients:
    """DPM-Solver++ of order 1, 2 (2M, midpoint) or 3 (3M), multistep, for the flow."""
    clock = _Clock(lam, g, g_next)
    weights = [clock.data_weights(i, clock.order_at(i, order)) for i in range(len(clock))]
    return Coefficients(sample=clock.s_next / clock.s, **columns("x0", weights))


def sde_dpmsolver_pp(lam: Tensor, g: Tensor, g_next: Tensor, order: int) -> Coefficients:
    r"""SDE-DPM-Solver++ of order 1 (a sample of the posterior) or 2, for the backward SDE of Eq. 17."""
    clock = _Clock(lam, g, g_next)
    weights = []
    for i in range(len(clock)):
        total = clock.a_next[i] * -torch.expm1(-2 * clock.h[i])
        slope = 0.5 * total * clock.h[i] / clock.h[i - 1] if clock.order_at(i, order) == 2 else None
        weights.append([total] if slope is None else [total + slope, -slope])
    mean, _, variance = process.posterior(lam, g, g_next)
    return Coefficients(sample=mean, noise=variance.sqrt(), **columns("x0", weights))


def unipc(lam: Tensor, g: Tensor, g_next: Tensor, order: int) -> Coefficients:
    r"""UniPC of order 1 to 3 (its `bh2` form): DPM-Solver++ as predictor, and a corrector without further calls.

    The call at a new sample also gives the prediction with which the step that led there is taken again, now by
    interpolation. Predictor and corrector are linear, so their product is one row: what is held from call to call is
    the corrected sample.
    """
    clock = _Clock(lam, g, g_next)
    zero = torch.zeros_like(clock.s[0])
    kept = clock.s_next / clock.s
    held, sample, data, hold_held, hold_sample, hold_data = [], [], [], [], [], []
    for i in range(len(clock)):
        predictor = clock.data_weights(i, clock.order_at(i, order, always_lower=True))
        if i == 0:
            corrector, on_held, on_sample = [], zero, torch.ones_like(zero)
        else:
            corrector = clock.corrector_weights(i - 1, clock.order_at(i - 1, order, always_lower=True))
            on_held, on_sample = kept[i - 1], zero
        size = max(len(predictor), len(corrector))
        corrector = corrector + [zero] * (size - len(corrector))
        predictor = predictor + [zero] * (size - len(predictor))
        hold_held.append(on_held)
        hold_sample.append(on_sample)
        hold_data.append(corrector)
        held.append(kept[i] * on_held)
        sample.append(kept[i] * on_sample)
        data.append([kept[i] * c + p for c, p in zip(corrector, predictor, strict=True)])
    hold = Coefficients(sample=torch.stack(hold_sample), held=torch.stack(hold_held), **columns("x0", hold_data))
    return Coefficients(sample=torch.stack(sample), held=torch.stack(held), **columns("x0", data), hold=hold)


def deis(lam: Tensor, g: Tensor, g_next: Tensor, order: int) -> Coefficients:
    r"""DEIS of order 1 to 4: Adams-Bashforth in $\sigma$ with the actual step sizes ($\rho$AB)."""
    clock = _Clock(lam, g, g_next)
    return clock.noise_coefficients([clock.noise_weights(i, clock.warm(i, order)) for i in range(len(clock))])


def ipndm(lam: Tensor, g: Tensor, g_next: Tensor, order: int) -> Coefficients:
    r"""The rule of iPNDM: Adams-Bashforth in $\sigma$ with the weights of equal steps, whatever the grid."""
    clock = _Clock(lam, g, g_next)
    one = torch.ones_like(clock.s[0])
    return clock.noise_coefficients(
        [[w * one for w in ADAMS_BASHFORTH[clock.warm(i, order)]] for i in range(len(clock))]
    )


class _Clock:
    """The numbers of a grid of n steps that the solvers share, each `(n, *lambda_shape)` in float64."""

    def __init__(self, lam: Tensor, g: Tensor, g_next: Tensor):
        self.a, self.a_next = (process.mean_scale(lam, x) for x in (g, g_next))
        self.s, self.s_next = (process.std(lam, x) for x in (g, g_next))
        self.l, self.l_next = process.log_snr(lam, g) / 2, process.log_snr(lam, g_next) / 2
        self.h = self.l_next - self.l
        self.to_data = bool((g_next[-1] == 0).all())
        self.blind = blind_calls(lam, g)

    def __len__(self) -> int:
        return len(self.a)

    def warm(self, i: int, order: int) -> int:
        """The order that the predictions so far allow."""
        return min(order, max(1, i + 1 - self.blind))

    def order_at(self, i: int, order: int, always_lower: bool = False) -> int:
        """As Diffusers: lower at both ends of a run of few steps, and 1 in a step to the data, which is infinite."""
        left, order = len(self) - i, self.warm(i, order)
        if left == 1 and self.to_data:
            return 1
        return min(order, left) if always_lower or len(self) < FEW_STEPS else order

    def nodes(self, i: int, count: int) -> list[Tensor]:
        """Where in l the last `count` predictions lie, in units of step i from its start: 0, then negative."""
        return [(self.l[i - j] - self.l[i]) / self.h[i] for j in range(count)]

    def data_weights(self, i: int, order: int) -> list[Tensor]:
        """Weights of the last predictions of the data in the predictor of step i, newest first."""
        total = self.a_next[i] * -torch.expm1(-self.h[i])
        if order == 1:
            return [total]
        if order == 2:  # the midpoint form: half a step of the slope, and not its exact integral
            slope = 0.5 * total * self.h[i] / self.h[i - 1]
            return [total + slope, -slope]
        return [self.a_next[i] * w for w in moment_weights(self.nodes(i, order), _moments(self.h[i], order))]

    def corrector_weights(self, i: int, order: int) -> list[Tensor]:
        """The same for step i taken again with the prediction at its end, which comes first."""
        if order == 1:  # the mean of both ends
            half = 0.5 * self.a_next[i] * -torch.expm1(-self.h[i])
            return [half, half]
        nodes = [torch.ones_like(self.h[i]), *self.nodes(i, order)]
        return [self.a_next[i] * w for w in moment_weights(nodes, _moments(self.h[i], order + 1))]

    def noise_weights(self, i: int, order: int) -> list[Tensor]:
        """Weights of the last predictions of the noise, in units of the step in sigma."""
        # sigma_j / sigma_i = exp(l_i - l_j), so that nothing is divided by a vanishing a
        step = torch.expm1(-self.h[i])
        nodes = [torch.expm1(self.l[i] - self.l[i - j]) / step for j in range(order)]
        one = torch.ones_like(step)
        return moment_weights(nodes, [one / (k + 1) for k in range(order)])

    def noise_coefficients(self, weights: list[list[Tensor]]) -> Coefficients:
        """Of a step in the noise, with weights in units of the step in sigma."""
        growth = self.a_next / self.a
        step = self.s_next - growth * self.s  # a_r times the step in sigma
        return Coefficients(
            sample=growth, **columns("eps", [[step[i] * w for w in row] for i, row in enumerate(weights)])
        )


def blind_calls(lam: Tensor, g: Tensor) -> int:
    """How many calls are made where some dimension has no signal left, whose predictions are of no use later on."""
    signal = process.log_snr(lam, g).reshape(len(g), -1).amin(1)
    return int((signal < 2 * math.log(LEAST_SIGNAL)).sum())


def _moments(h: Tensor, count: int) -> list[Tensor]:
    r"""$\int_0^1 h e^{-(1-u) h} u^k du$ for $k = 0, 1, \dots$: by parts where h is large, else by their series."""
    small = h.clamp(max=1.0)
    moments = []
    by_parts = -torch.expm1(-h)
    for k in range(count):
        if k:
            by_parts = 1 - k * by_parts / h
        series = sum(
            (-1) ** m * math.factorial(k) / math.factorial(k + m + 1) * small ** (m + 1) for m in range(SERIES)
        )
        moments.append(torch.where(h > 1, by_parts, series))
    return moments


def moment_weights(nodes: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
    r"""The weights $w$ with $\sum_j w_j u_j^k = \mu_k$ for all k: Björck and Pereyra's algorithm, elementwise."""
    n, w = len(nodes), list(moments)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] = w[i] - nodes[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] = w[i] / (nodes[i] - nodes[i - k - 1])
        for i in range(k, n - 1):
            w[i] = w[i] - w[i + 1]
    return w


def columns(name: str, rows: list[list[Tensor]]) -> dict[str, Any]:
    """Rows of weights, newest first, as the columns `name`, `name_1`, ...; absent ones are 0."""
    zero = torch.zeros_like(rows[0][0])
    count = max(len(row) for row in rows)
    padded = [row + [zero] * (count - len(row)) for row in rows]
    return {name if j == 0 else f"{name}_{j}": torch.stack([row[j] for row in padded]) for j in range(count)}
