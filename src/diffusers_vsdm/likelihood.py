r"""Exact log-likelihoods of models that sample by the probability flow.

In the coordinates $y = x_t / a_t$ the flow of Eq. 18 is $dy/dg = -s_\theta(x_t) / 2 a_t$, whatever $\lambda$ is, and
the log-density falls along it by the divergence:

$$ \log p(x_0) = \log \pi(x_T) + \sum_i \log \frac{a_{T,i}}{a_{0,i}}
   - \tfrac12 \int \nabla \cdot s_\theta(x_t) \, dg . $$

The flow runs between the first and the last training time; a model makes no statement about times before the first.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", Eq. 18.
    Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations", section 4.3.
    Theis, van den Oord, Bethge (2016), "A note on the evaluation of generative models": dequantisation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .discrete import training_time_at
from .objectives.divergence import divergence, draw_probe
from .schedulers import VSDMScheduler


LEVELS = 256  # of an image's values
MOST_STEPS = 500  # some ten times what a trained network takes


@dataclass(frozen=True)
class LogLikelihood:
    """Log-densities of samples.

    Attributes:
        value: In nats, `(batch,)`, in float64 on the CPU.
        num_function_evaluations: Network calls for each sample; a divergence takes its backward passes besides.
    """

    value: Tensor
    num_function_evaluations: int


def flow_log_likelihood(
    score: Callable[[Tensor, Tensor], Tensor],
    scheduler: VSDMScheduler,
    sample: Tensor,
    kind: str = "exact",
    generator: torch.Generator | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> LogLikelihood:
    r"""Log-density of data under the probability flow, by an adaptive solver (Dormand-Prince 5(4) of torchdiffeq).

    Args:
        score: $s_\theta(x_t, k)$, differentiable in $x_t$, at training times k `(batch,)`, fractional ones among them.
        scheduler ([`VSDMScheduler`]): The process and its prior.
        sample: Data in model units, `(batch, *event_shape)`.
        kind: Of the divergence, see [`draw_probe`]; a random direction is the same along the whole path.
        generator: Of that direction.
        rtol, atol: Tolerances of a step.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: There is no signal at the last training time, or the dimension is too large for an exact
            divergence.
        FloatingPointError: The flow is not finite.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("Likelihoods need torchdiffeq: pip install diffusers-vsdm[likelihood]") from error
    table = scheduler.integrated_beta
    probe, basis, calls = draw_probe(sample, kind, generator), scheduler.basis(sample), 0

    def signal(k: Tensor | int) -> Tensor:
        a, _ = scheduler.marginal_scales(sample[:1], k)
        return a[0].expand(sample.shape[1:])

    def flow(log_g: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        g = log_g.cpu().double().exp().clamp(table[0], table[-1])
        k = training_time_at(g, table)
        a, steps = signal(k.to(sample.dtype)), k.to(sample.device, torch.float32).expand(len(sample))
        value, trace = divergence(lambda x: score(x, steps), basis.from_basis(a * state[0]), probe)
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"The score is not finite at training time {float(k):.2f}.")
        half = -0.5 * g.to(sample)
        return half * basis.to_basis(value) / a, half * trace

    first, last = signal(0), signal(len(table) - 1)
    if not (last > torch.finfo(last.dtype).tiny).all():
        raise ValueError(
            "The process has no signal left at its last training time (zero terminal SNR, or lambda * g too large for"
            f" {last.dtype}), and so no likelihood of its flow."
        )
    start = basis.to_basis(sample) / first, sample.new_zeros(len(sample))
    span = table[[0, -1]].log().to(sample)
    options = {"max_num_steps": MOST_STEPS, "dtype": sample.dtype}  # of times too: not all devices have float64
    try:
        path, gained = odeint(flow, start, span, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # torchdiffeq's word for a solver that cannot go on
        raise FloatingPointError(
            f"The solver cannot keep to its tolerances ({error}): raise `rtol` and `atol`, or use float32."
        ) from error
    at_noise = scheduler.prior().log_prob(basis.from_basis(last * path[-1]).cpu().double())
    return LogLikelihood(at_noise + (last / first).cpu().double().log().sum() + gained[-1].cpu().double(), calls)


def dequantize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images of whole numbers 0 to 255 as points of [0, 1], each value spread evenly over its 256th part."""
    noise = torch.rand(images.shape, generator=generator, device=getattr(generator, "device", "cpu"))
    return (images.float() + noise.to(images.device)) / LEVELS


def bits_per_dimension(log_likelihood: Tensor, num_dimensions: int) -> Tensor:
    r"""$-\log_2 p / d$ of log-densities of images in steps of one level, from nats."""
    return -log_likelihood / (num_dimensions * math.log(2))
