r"""A process with networks on both sides (SB-FBSDE), over the Ornstein-Uhlenbeck process of a scheduler.

In the clock $dg = \beta_t dt$, forward and backward in time,

$$ dx = (-\tfrac12 D x + z_f) \, dg + dw , \qquad dx = (-\tfrac12 D x - z_b) \, dg + d\bar w , $$

with $z_f = \nabla \log \psi$ and $z_b = \nabla \log \hat\psi$ at the Schrödinger bridge between data and prior. Where
both are laws of one process $z_f + z_b = \nabla \log p_t$, and $\frac12 (z_f - z_b) - \frac12 D x$ is the probability
flow (Eq. 26 of Kaba et al.). $z_f = 0$ is VSDM, with the score for $z_b$; with $D = I$ too, a score-based model.

A step over $h$ is $x' = a x + (s^2 / a) z + s \xi$, with $a = e^{-\lambda h/2}$ and $s^2 = (1 - a^2) / \lambda$;
backwards with $-\lambda$. Its mean is exact for any $h$: $z$ tells the mean of the far end given $x$ (Tweedie's
formula), and what lies between is in the mean on the reference's bridge to there.

References:
    Chen, Liu, Theodorou (2022), "Likelihood Training of Schrödinger Bridge using Forward-Backward SDEs Theory".
    Kaba, Shimizu, Ohzeki, Sughiyama (2024), "Schrödinger Bridge Type Diffusion Models as an Extension of Variational
        Autoencoders".
    Shi, De Bortoli, Campbell, Doucet (2023), "Diffusion Schrödinger Bridge Matching".
    Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations": the corrector.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import process
from ..schedulers import VSDMScheduler


# z at x of shape (n, *event_shape) and training times k of shape (n,)
Policy = Callable[[Tensor, Tensor], Tensor]
CORRECTOR_RATIO = 0.1  # of the score's part of a corrector's step to that of the noise


class TwoSidedProcess:
    r"""Simulates both directions on a grid of training times.

    Args:
        scheduler ([`VSDMScheduler`]): The reference: its table, its drift, its basis.
        forward, backward: $z_f$ and $z_b$. At the data, k = -1, they are asked for what holds at k = 0.
        num_steps (`int`, *optional*): Steps between data and prior, at most as many as training times, the default.
        corrector_steps (`int`, defaults to 0): Steps of Langevin dynamics with the score $z_f + z_b$ after each of
            them but at the data, with the step size of Song et al. (2021), Algorithm 5. The law at each time is then
            nearer to what the networks take it for, and the paths are none of the process.

    Attributes:
        times: The training times k, `(num_steps + 1,)` whole numbers from -1 up, evenly spaced until [`moved`].
        g: The clock there, float64.

    Raises:
        ValueError: A rate varies in time, there is no signal at the last time, or too many steps are asked for.
    """

    def __init__(
        self,
        scheduler: VSDMScheduler,
        forward: Policy,
        backward: Policy,
        num_steps: int | None = None,
        corrector_steps: int = 0,
    ):
        if scheduler.drift is not None and scheduler.drift.num_times is not None:
            raise ValueError("A lambda for each training time is no reference for a bridge: take one for all.")
        if not torch.isfinite(scheduler.integrated_beta[-1]):
            raise ValueError("The reference of a bridge needs a signal at its last training time.")
        most = len(scheduler)
        num_steps = most if num_steps is None else num_steps
        if not 1 <= num_steps <= most:
            raise ValueError(f"`num_steps` must lie between 1 and the {most} training times, got {num_steps}.")
        if corrector_steps < 0:
            raise ValueError(f"`corrector_steps` must not be negative, got {corrector_steps}.")
        self.scheduler, self.forward, self.backward = scheduler, forward, backward
        self.corrector_steps = corrector_steps
        self._visit(torch.linspace(-1, most - 1, num_steps + 1, dtype=torch.float64).round())

    def _visit(self, times: Tensor) -> None:
        self.times = times.long()
        self.g = torch.cat([torch.zeros(1, dtype=torch.float64), self.scheduler.integrated_beta])[self.times + 1]

    def moved(self, generator: torch.Generator) -> Self:
        """The same with other times between the ends: each drawn from its own part of all training times."""
        most, moved = len(self.scheduler), copy.copy(self)
        if len(self) < most:
            parts = torch.linspace(0, most - 1, len(self), dtype=torch.float64).floor()
            place = torch.rand(len(self) - 1, generator=generator, device=generator.device).cpu().double()
            inner = (parts[:-1] + place * parts.diff()).floor()
            moved._visit(torch.cat([self.times[:1], inner, self.times[-1:]]))
        return moved

    def __len__(self) -> int:
        return len(self.times) - 1

    @property
    def _lam(self) -> Tensor:
        drift = self.scheduler.drift
        return self.scheduler.mean_lambda if drift is None else drift.lam

    def coefficients(self, like: Tensor, direction: int) -> tuple[Tensor, Tensor, Tensor]:
        """$a$, $c$ and $s$ of every step, `(num_steps, *broadcastable)`, on the sample's device.

        Args:
            like: A sample `(n, *event_shape)`.
            direction: 1 for forward steps, -1 for backward ones; both in the order of the times.
        """
        lam = direction * self._lam
        h = torch.diff(self.g).reshape(-1, *[1] * lam.ndim)
        a, s2 = process.mean_scale(lam, h), process.variance(lam, h)
        found = a, s2 / a, s2.sqrt()
        shape = [len(self), *(lam.shape or [1] * (like.ndim - 1))]
        a, c, s = (x.expand(len(self), *lam.shape).reshape(shape).to(like.device, like.dtype) for x in found)
        return a, c, s

    def run(self, start: Tensor, direction: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Simulate paths by the SDE; differentiable in the networks.

        Args:
            start: Samples of the data for `direction` 1, of the prior for -1; `(n, *event_shape)` in model units.
            direction: 1 forward, -1 backward.
            generator: Of the noise.

        Returns:
            The paths in the order of the times, from data to prior, `(num_steps + 1, n, *event_shape)`, and the
            direction's $z$ along them, but at the data, `(num_steps, n, *event_shape)`.

        Raises:
            FloatingPointError: A path is not finite; the message tells the training time, or that it is the data.
        """
        path, controls = [start], []
        for x, z in self._steps(start, direction, generator):
            path.append(x)
            controls.append(z)
        if direction > 0:
            controls = [*controls[1:], self.control(path[-1], self.times[-1], 1)]
        return torch.stack(path[::direction]), torch.stack(controls[::direction])

    def control(self, x: Tensor, k: Tensor, direction: int) -> Tensor:
        """$z$ of one direction for samples `(n, *event_shape)` at one of the `times`."""
        policy = self.forward if direction > 0 else self.backward
        return policy(x, k.clamp(min=0).to(x.device).expand(len(x)))

    def arrive(self, start: Tensor, direction: int, generator: torch.Generator | None = None) -> Tensor:
        """Where the paths of [`run`] end, of which no more is kept; `(n, *event_shape)`."""
        ((end, _),) = deque(self._steps(start, direction, generator), maxlen=1)
        return end

    def _steps(
        self, start: Tensor, direction: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The point after each step, and the z that led there."""
        a, c, s = self.coefficients(start, direction)
        basis = self.scheduler.basis(start)
        order = range(len(self)) if direction > 0 else range(len(self) - 1, -1, -1)
        x = start
        for j in order:
            k = self.times[j] if direction > 0 else self.times[j + 1]
            z = self.control(x, k, direction)
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            moved = a[j] * basis.to_basis(x) + c[j] * basis.to_basis(z) + s[j] * basis.to_basis(noise)
            x = basis.from_basis(moved)
            arrived = self.times[j + 1] if direction > 0 else self.times[j]
            for _ in range(self.corrector_steps if arrived >= 0 else 0):
                x = self._langevin(x, arrived, generator)
            if not torch.isfinite(x).all():
                name = "forward" if direction > 0 else "backward"
                place = f"training time {int(arrived)}" if arrived >= 0 else "the data"
                raise FloatingPointError(f"The {name} paths are not finite at {place}.")
            yield x, z

    def matching_target(
        self, ends: tuple[Tensor, Tensor], at: Tensor, direction: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""A point between two ends, by the reference given both, and what $z$ is in the mean over all such ends.

        $z_f = E[\nabla_x \log q(x_T | x)]$ and $z_b = E[\nabla_x \log q(x | x_0)]$ over the reference's bridges $q$
        between the ends of a path hold where the law of paths is a mixture of those bridges, as in all half bridges
        of iterative proportional fitting (Shi et al. 2023).

        Args:
            ends: $x_0$ and $x_T$, `(n, *event_shape)` each.
            at: Places in `times`, `(n,)`; not the last one for $z_f$, nor the first for $z_b$.
            direction: 1 for the target of $z_f$, -1 for that of $z_b$.
            generator: Of the noise.

        Returns:
            The point and the target, `(n, *event_shape)`, and the standard deviation of the transition whose score
            the target is, in the drift's basis and shaped to broadcast there: the target is as large as its inverse.
        """
        start, end = ends
        basis = self.scheduler.basis(start)
        x_0, x_T = basis.to_basis(start), basis.to_basis(end)
        lam = self._lam
        g = self.g[at.cpu()].reshape(-1, *[1] * (start.ndim - 1))
        on_end, on_start, variance = process.posterior(lam, self.g[-1], g)
        far = g if direction < 0 else self.g[-1] - g
        found = on_end, on_start, variance.sqrt(), process.mean_scale(lam, far), process.std(lam, far)
        on_end, on_start, spread, a, s = (x.to(start) for x in found)
        noise = randn_tensor(start.shape, generator=generator, device=start.device, dtype=start.dtype)
        x = on_end * x_T + on_start * x_0 + spread * noise
        target = (a * x_0 - x if direction < 0 else a * (x_T - a * x)) / s**2
        return basis.from_basis(x), basis.from_basis(target), s

    def log_density(self, path: Tensor, direction: int) -> Tensor:
        """Of the steps between the points of a path, taken forward or backward, `(num_steps, n)` in nats."""
        basis = self.scheduler.basis(path[0])
        y = basis.to_basis(path)
        a, c, s = (x[:, None] for x in self.coefficients(path[0], direction))
        start, end = (y[:-1], y[1:]) if direction > 0 else (y[1:], y[:-1])
        points, times = (path[:-1], self.times[:-1]) if direction > 0 else (path[1:], self.times[1:])
        z = torch.stack([self.control(x, k, direction) for x, k in zip(points, times, strict=True)])
        error = (end - a * start - c * basis.to_basis(z)) / s
        density = -0.5 * error.square() - (s + torch.zeros_like(error)).log() - 0.5 * math.log(2 * math.pi)
        return density.flatten(2).sum(2)

    def entropy(self, like: Tensor) -> Tensor:
        """Of the noise of all forward steps: minus the mean of their log-density, in nats."""
        _, _, s = self.coefficients(like, 1)
        return (s.log() + 0.5 * math.log(2 * math.pi * math.e) + torch.zeros_like(like[0])).sum()

    def log_ratio(self, path: Tensor) -> tuple[Tensor, Tensor]:
        r"""How much likelier forward steps are than the backward ones between the same points, in nats.

        With $-\log \pi(x_T)$ the mean over forward paths from $x_0$ bounds $-\log p(x_0)$ of the model that takes
        these backward steps from the prior $\pi$: a variational autoencoder's bound, in discrete time.

        Args:
            path: Of [`run`], `(num_steps + 1, n, *event_shape)`.

        Returns:
            The ratio of the first step, which has the data at one end, and that of all others: `(n,)` each.
        """
        steps = self.log_density(path, 1) - self.log_density(path, -1)
        return steps[0], steps[1:].sum(0)

    def _langevin(self, x: Tensor, k: Tensor, generator: torch.Generator | None) -> Tensor:
        score = self.control(x, k, 1) + self.control(x, k, -1)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        sizes = [y.flatten(1).norm(dim=1).mean() for y in (noise, score)]
        step = 2 * (CORRECTOR_RATIO * sizes[0] / sizes[1].clamp(min=1e-12)) ** 2
        return x + step * score + (2 * step).sqrt() * noise
