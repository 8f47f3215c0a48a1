r"""Stochastic approximation of the drift (Algorithm 1, second half): simulate backwards, take moments, step.

The loss for the linear forward score $A x$ (Eq. 10) is quadratic in $A$, and its divergence term is exactly
$\beta \, \mathrm{tr} A$. Its gradient therefore needs two moments of the simulated backward trajectories and no
automatic differentiation. At the $A$ that the trajectories were simulated with, and up to the factor $\beta$, it is

- `zeta_placement="divergence"`: $E[\mathrm{score}_i x_i] + \zeta$, with $\zeta$ on the divergence. Figure 9 of the
  paper comes from this form. With the exact score and matching marginals $E[\mathrm{score}_i x_i] = -1$ (Stein), so
  $\zeta < 1$ lets $\lambda$ sink where the prior is reached and rise where it is not.
- `zeta_placement="inner_product"`: $1 + \zeta E[\mathrm{score}_i x_i] + (1 - \zeta) A_i E[x_i^2]$, Eq. 6 as printed.

All of it in the coordinates of the drift's basis. Averaged over time with weight $\beta \, dt = dg$, the step is
$\log \lambda \mathrel{+}= \eta_k \cdot$ gradient: descending in $A$ is ascending in $\lambda = 1 - 2A$. The step sizes
are $\eta_k = a / (k^\alpha + b)$ (assumption A5).

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", sections 4.1, 4.3 and 5.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import process
from .drift import AdaptiveDiagonalDrift


GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "divergence": lambda score_x, x_x, a, zeta: score_x + zeta,
    "inner_product": lambda score_x, x_x, a, zeta: 1 + zeta * score_x + (1 - zeta) * a * x_x,
}
# what a posterior step may cover: with longer ones the simulated moments drift
STEPS_PER_G = 13.25
SIMULATION_PRIORS = ("standard", "conditional", "marginal")

ScoreFunction = Callable[[Tensor, int], Tensor]


@dataclass
class StageOutput:
    r"""What one stage of stochastic approximation saw and did; tensors have the shape of $\lambda$.

    Attributes:
        lam: $\lambda$ after the stage.
        score_x: $\int E[\mathrm{score}_i x_i] dg / \int dg$ along the backward trajectories.
        x_x: $\int E[x_i^2] dg / \int dg$.
        gradient: The clipped gradient that was stepped along.
        step_size: $\eta_k$.
        skipped: Whether the moments were not finite, so that $\lambda$ stayed as it was.
    """

    lam: Tensor
    score_x: Tensor
    x_x: Tensor
    gradient: Tensor
    step_size: float
    skipped: bool


class StochasticApproximation:
    r"""Learns an [`AdaptiveDiagonalDrift`] from backward trajectories of the current model.

    It needs no trainer, no scheduler and no gradients: call [`update`] with a score function every so many steps of
    any training loop. The random numbers are keyed by seed, stage and trajectory, so the result depends neither on
    the batch size nor on the number of processes.

    Args:
        drift ([`AdaptiveDiagonalDrift`]): The drift to learn, changed in place.
        integrated_beta (`Tensor`): $g_k$ at the training times `k = 0..N-1`, increasing, shape `(N,)`.
        zeta (`float`, defaults to 0.75): The $\zeta$ of Eq. 6, in (0, 1].
        zeta_placement (`str`, defaults to `"divergence"`): Where $\zeta$ stands, see above.
        prior (`str`, defaults to `"standard"`): Law of the trajectories' start: `"standard"` N(0, I), `"conditional"`
            $N(0, s_T^2)$ or `"marginal"` $N(a_T m, a_T^2 v + s_T^2)$. Only the first restrains $\lambda$ at zeta < 1.
        num_trajectories (`int`, defaults to 512): Trajectories in a stage.
        num_steps (`int`, *optional*): Steps of a trajectory, at most N; evenly spaced training times. Defaults to
            about 13 for each unit of $g_T$ (50 for the power law up to beta_max 10, 99 for 20).
        batch_size (`int`, *optional*): Trajectories simulated at once. Defaults to all of them.
        step_scale, step_offset, step_power (`float`): $a$, $b$ and $\alpha$ of $\eta_k = a / (k^\alpha + b)$.
        clip (`float`, defaults to 1.0): The gradient is clipped to [-clip, clip] in each entry.
        seed (`int`, defaults to 0): Seed of the trajectories' noise.

    Attributes:
        num_stages: Calls of [`update`] so far, skipped ones included.
        num_skipped: Stages whose moments were not finite.
    """

    def __init__(
        self,
        drift: AdaptiveDiagonalDrift,
        integrated_beta: Tensor,
        *,
        zeta: float = 0.75,
        zeta_placement: str = "divergence",
        prior: str = "standard",
        num_trajectories: int = 512,
        num_steps: int | None = None,
        batch_size: int | None = None,
        step_scale: float = 3.0,
        step_offset: float = 3.0,
        step_power: float = 0.6,
        clip: float = 1.0,
        seed: int = 0,
    ):
        g = torch.as_tensor(integrated_beta, dtype=torch.float64).cpu()
        if g.ndim != 1 or not (torch.diff(g, prepend=g.new_zeros(1)) > 0).all() or not torch.isfinite(g).all():
            raise ValueError("`integrated_beta` must be a finite, positive and increasing table of shape (N,).")
        num_steps = min(len(g), max(1, round(STEPS_PER_G * float(g[-1])))) if num_steps is None else num_steps
        checks = {
            "zeta": (zeta, 0 < zeta <= 1, "a number in (0, 1]"),
            "zeta_placement": (zeta_placement, zeta_placement in GRADIENTS, f"one of {tuple(GRADIENTS)}"),
            "prior": (prior, prior in SIMULATION_PRIORS, f"one of {SIMULATION_PRIORS}"),
            "num_trajectories": (num_trajectories, num_trajectories >= 1, "at least 1"),
            "num_steps": (num_steps, 1 <= num_steps <= len(g), f"between 1 and the {len(g)} training times"),
            "batch_size": (batch_size, batch_size is None or batch_size >= 1, "at least 1"),
            "step_scale": (step_scale, step_scale > 0, "positive"),
            "step_offset": (step_offset, step_offset >= 0, "not negative"),
            "step_power": (step_power, 0.5 < step_power <= 1, "in (0.5, 1] (assumption A5)"),
            "clip": (clip, clip > 0, "positive"),
        }
        for name, (value, is_valid, remedy) in checks.items():
            if not is_valid:
                raise ValueError(f"`{name}` must be {remedy}, got {value!r}.")
        self.drift = drift
        self.zeta = zeta
        self.zeta_placement = zeta_placement
        self.prior = prior
        self.num_trajectories = num_trajectories
        self.batch_size = batch_size or num_trajectories
        self.step_scale, self.step_offset, self.step_power = step_scale, step_offset, step_power
        self.clip = clip
        self.seed = seed
        self.num_stages = 0
        self.num_skipped = 0
        # training times N-1 .. first, and the g that each step goes down to
        self.timesteps = np.linspace(len(g) - 1, -1, num_steps + 1).round().astype(int)[:-1].tolist()
        self.g = g[self.timesteps]
        self.g_next = torch.cat([self.g[1:], g.new_zeros(1)])

    def step_size(self, stage: int) -> float:
        r"""$\eta_k$ of the `stage`-th update, counted from 1."""
        return self.step_scale / (stage**self.step_power + self.step_offset)

    @torch.no_grad()
    def update(
        self,
        score: ScoreFunction,
        device: torch.device | str = "cpu",
        process_index: int = 0,
        num_processes: int = 1,
        reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> StageOutput:
        r"""One stage: simulate backwards from the prior with the current $\lambda$, then step the drift.

        The simulation takes the process's exact posterior steps. Those of Euler and Maruyama (Eq. 22) come to the same
        moments with about four times as many, on the paper's stretched axes.

        Args:
            score: `score(x, k)` is the model's score of $x_t$ at training time `k` (an integer), with `x` of shape
                `(n, *event_shape)` in float32 on `device`; it must be the network's at the current drift.
            device: Where to simulate.
            process_index, num_processes: This process simulates every `num_processes`-th trajectory.
            reduce_sum: Sums a CPU tensor over the processes.

        Returns:
            [`StageOutput`]: moments, step and the new $\lambda$.
        """
        self.num_stages += 1
        mine = range(process_index, self.num_trajectories, num_processes)
        coefficients = self._coefficients(torch.device(device))
        total = torch.zeros((2, *self.drift.lam.shape), dtype=torch.float64)
        for start in range(0, len(mine), self.batch_size):
            total += self._simulate(score, mine[start : start + self.batch_size], *coefficients)
        score_x, x_x = reduce_sum(total) / self.num_trajectories

        lam = self.drift.lam
        skipped = not bool(torch.isfinite(torch.stack([score_x, x_x])).all())
        gradient = GRADIENTS[self.zeta_placement](score_x, x_x, (1 - lam) / 2, self.zeta).clamp(-self.clip, self.clip)
        eta = self.step_size(int(self.drift.num_updates) + 1)
        if skipped:
            self.num_skipped += 1
            warnings.warn(
                f"Stage {self.num_stages} of stochastic approximation is skipped: the moments of the backward"
                f" trajectories are not finite (lambda is {lam.min():.3g} to {lam.max():.3g}; the network's score may"
                " have blown up). Lambda stays as it was.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self.drift.step(gradient, eta)
        return StageOutput(self.drift.lam.clone(), score_x, x_x, gradient, eta, skipped)

    def _coefficients(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of sample, score and noise in a step, which is linear in them: each `(num_steps, *lambda_shape)`."""
        shape = (-1, *[1] * self.drift.lam.ndim)
        rates = (self.drift.lam, self.g.reshape(shape), self.g_next.reshape(shape))
        one = torch.ones_like(rates[0] * rates[1])
        on_x, variance = process.ancestral_step(*rates, one, torch.zeros_like(one))
        on_score, _ = process.ancestral_step(*rates, torch.zeros_like(one), one)
        on_x, on_score, on_noise = (c.to(device, torch.float32) for c in (on_x, on_score, variance.sqrt()))
        return on_x, on_score, on_noise

    def _simulate(
        self, score: ScoreFunction, trajectories: range, on_x: Tensor, on_score: Tensor, on_noise: Tensor
    ) -> Tensor:
        """Both time-averaged moments, summed over trajectories and shaped as lambda: float64, `(2, *lambda_shape)`."""
        device = on_x.device
        noise = torch.stack([self._noise(index) for index in trajectories], dim=1).to(device)
        basis = self.drift.basis(device, torch.float32)
        mean, scale = (moment.to(device, torch.float32) for moment in self._prior_moments())
        x = mean + scale * noise[0]
        # mean over the event's dimensions that share one lambda (of a stack of two moments), sum over trajectories
        shared = [dim + 2 for dim, size in enumerate(self.drift.lam.shape) if size == 1]
        total = torch.zeros((2, *self.drift.lam.shape), dtype=torch.float32, device=device)
        steps = (self.g - self.g_next).tolist()
        for i, (k, dg) in enumerate(zip(self.timesteps, steps, strict=True)):
            score_x = basis.to_basis(score(basis.from_basis(x), k))
            moments = torch.stack([score_x * x, x * x])
            total += dg * (moments.mean(shared, keepdim=True) if shared else moments).sum(1)
            x = on_x[i] * x + on_score[i] * score_x + on_noise[i] * noise[i + 1]
        return total.cpu().double() / sum(steps)

    def _noise(self, trajectory: int) -> Tensor:
        """Normal numbers of one trajectory: its start and every step, shape `(num_steps + 1, *event_shape)`."""
        entropy = np.random.SeedSequence([self.seed, self.num_stages, trajectory]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy) >> 1)
        return torch.randn((len(self.timesteps) + 1, *self.drift.event_shape), generator=generator)

    def _prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the trajectories' start."""
        zero, one = torch.zeros_like(self.drift.data_mean), torch.ones_like(self.drift.data_mean)
        if self.prior == "standard":
            return zero, one
        data = (self.drift.data_mean, self.drift.data_variance) if self.prior == "marginal" else (zero, zero)
        mean, variance = process.marginal_moments(self.drift.lam, self.g[0], *data)
        return mean.expand_as(one), variance.sqrt().expand_as(one)
