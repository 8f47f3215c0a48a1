r"""Stochastic approximation of the drift (Algorithm 1, second half): simulate backwards, take moments, step.

The loss for the linear forward score $A x$ (Eq. 10) is quadratic in $A$, and its divergence term is exactly
$\beta \, \mathrm{tr} A$. Its gradient therefore needs two moments of the simulated backward trajectories and no
automatic differentiation. At the $A$ that the trajectories were simulated with, and up to the factor $\beta$, it is

- `zeta_placement="divergence"`: $E[\mathrm{score}_i x_i] + \zeta$, with $\zeta$ on the divergence. Figure 9 of the
  paper comes from this form. With the exact score and matching marginals $E[\mathrm{score}_i x_i] = -1$ (Stein), so
  $\zeta < 1$ lets $\lambda$ sink where the prior is reached and rise where it is not.
- `zeta_placement="inner_product"`: $1 + \zeta E[\mathrm{score}_i x_i] + (1 - \zeta) A_i E[x_i^2]$, Eq. 6 as printed.

All of it in the coordinates of the drift's basis. Averaged over time with weight $\beta \, dt = dg$, the step is
$\log \lambda \mathrel{+}= \eta_k \cdot$ gradient: descending in $A$ is ascending in $\lambda = 1 - 2A$, or in
$\lambda = -2A$ over a variance-exploding reference. The step sizes are $\eta_k = a / (k^\alpha + b)$ (assumption A5).
With `step_count="stages"` k counts stages. But the moment's response to $\lambda$ differs several times between the
axes of the paper's toys, and one sequence of steps is too long for one and too short for the other. With
`"sign_changes"` k counts for each $\lambda$ the changes of its gradient's sign: steps keep their size as long as they
lead somewhere (Kesten; Delyon and Juditsky).
Where the drift's axes are learned (`basis="dense"`) the moments are matrices and the gradient is the symmetric part of
theirs.

`update="ipf"` takes the minimiser of that loss at $\zeta = 1$ instead of a step,

$$ A \leftarrow A - (1 + E[\mathrm{score}_i x_i]) / E[x_i^2] , $$

which for a drift with a $\lambda$ at each time and Gaussian laws is iterative proportional fitting:
$A_t \leftarrow A_t + \Sigma_f^{-1} - \Sigma_b^{-1}$, with the covariances of the forward process and of the backward
one that starts at the prior. It arrives at the Schrödinger bridge. The simulated steps then have the noise of Gaussian
data ([`process.gaussian_posterior_variance`]), since any error of their variance would count as a difference of laws.
With samples of the data it divides $E[\mathrm{score}_i x_i]$ by the same expectation under the forward process, which
is $-1$ for a perfect network: each stage adds the score's error to $A$, a large one near the data, and most of it is
common to both sides.
Steps along the gradient, at $\zeta = 1$ and one for each time, stop at the first drift that carries the data to the
prior; at $\zeta < 1$ they stop nowhere.

References:
    Deng et al. (2024), "Variational Schrödinger Diffusion Models", sections 4.1, 4.3 and 5.
    De Bortoli et al. (2021), "Diffusion Schrödinger Bridge with Applications to Score-Based Generative Modeling": IPF.
    Kesten (1958), "Accelerated Stochastic Approximation", The Annals of Mathematical Statistics.
    Delyon, Juditsky (1993), "Accelerated Stochastic Approximation", SIAM Journal on Optimization.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import process
from .discrete import DiscreteProcess
from .drift import AdaptiveDiagonalDrift


GRADIENTS = ("divergence", "inner_product")
UPDATES = ("gradient", "ipf")
STEP_COUNTS = ("stages", "sign_changes")
# what a posterior step may cover: with longer ones the simulated moments drift
STEPS_PER_G = 13.25
NOISE_VALUES = 1 << 14  # of a trajectory that are drawn at once: those of all steps of images are a lot of memory
SIMULATION_PRIORS = ("standard", "conditional", "marginal")

ScoreFunction = Callable[..., Tensor]  # of (x, k), see `update`


@dataclass
class StageOutput:
    r"""What one stage of stochastic approximation saw and did; tensors have the shape of $\lambda$.

    Where the drift's axes turn, moments and gradient are matrices `(d, d)` along the axes before the stage.

    Attributes:
        lam: $\lambda$ after the stage.
        score_x: $\int E[\mathrm{score}_i x_i] dg / \int dg$ along the backward trajectories; where $\lambda$ varies in
            time, $E[\mathrm{score}_i x_i]$ at each time.
        x_x: The same of $E[x_i^2]$.
        gradient: The clipped gradient.
        step_size: $\eta_k$, one or in the shape of $\lambda$; 1 for IPF, and 0 if skipped.
        skipped: Whether the moments were not finite, so that $\lambda$ stayed as it was.
    """

    lam: Tensor
    score_x: Tensor
    x_x: Tensor
    gradient: Tensor
    step_size: float | Tensor
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
        update (`str`, defaults to `"gradient"`): `"gradient"` for a Robbins-Monro step on the logarithm, `"ipf"` for
            the minimiser, see above.
        prior (`str`, defaults to `"standard"`): Law of the trajectories' start: `"standard"` N(0, I), `"conditional"`
            $N(0, s_T^2)$ or `"marginal"` $N(a_T m, a_T^2 v + s_T^2)$. Only the first restrains $\lambda$ at zeta < 1.
        prior_variance (`float`, *optional*): Variance of the standard prior, to which $\lambda$ carries the data.
            Defaults to that of the reference: 1, or $g_T$ where it is variance-exploding.
        variance_exploding (`bool`, defaults to `False`): Whether the reference, the process at $A = 0$, is the
            variance-exploding one, $\lambda = -2A$, and not that of $\lambda = 1 - 2A$.
        num_trajectories (`int`, defaults to 512): Trajectories in a stage.
        num_steps (`int`, *optional*): Steps of a trajectory, at most N; evenly spaced training times. Defaults to
            about 13 for each unit of $g_T$ (50 for the power law up to beta_max 10, 99 for 20), or N where the
            reference is variance-exploding; N, and no less, where $\lambda$ varies in time.
        batch_size (`int`, *optional*): Trajectories simulated at once. Defaults to all of them.
        step_scale, step_offset, step_power (`float`): $a$, $b$ and $\alpha$ of $\eta_k = a / (k^\alpha + b)$.
        step_count (`str`, defaults to `"stages"`): What k counts from 1: `"stages"`, or `"sign_changes"` of each
            gradient; where the axes turn, the times that the whole one has turned by more than a right angle.
        clip (`float`, defaults to 1.0): The gradient is clipped to [-clip, clip] in each entry, or in each eigenvalue
            where the axes turn.
        seed (`int`, defaults to 0): Seed of the trajectories' noise.

    Attributes:
        num_stages: Calls of [`update`] so far, skipped ones included.
        num_skipped: Stages whose moments were not finite.
        sign_changes: If they are counted, of each gradient, in the shape of $\lambda$, or of the whole one where the
            axes turn.
        last_gradient: That of the stage before, in the samples' coordinates where the axes turn; 0 at first.
    """

    def __init__(
        self,
        drift: AdaptiveDiagonalDrift,
        integrated_beta: Tensor,
        *,
        zeta: float = 0.75,
        zeta_placement: str = "divergence",
        update: str = "gradient",
        prior: str = "standard",
        prior_variance: float | None = None,
        variance_exploding: bool = False,
        num_trajectories: int = 512,
        num_steps: int | None = None,
        batch_size: int | None = None,
        step_scale: float = 3.0,
        step_offset: float = 3.0,
        step_power: float = 0.6,
        step_count: str = "stages",
        clip: float = 1.0,
        seed: int = 0,
    ):
        g = torch.as_tensor(integrated_beta, dtype=torch.float64).cpu()
        if torch.isposinf(g).any():
            raise ValueError(
                "The process has no signal at its last training time (zero terminal SNR): it reaches the prior with"
                " every lambda, and there is none to learn. Leave it at 1: in training take `--baseline sgm`."
            )
        if g.ndim != 1 or not (torch.diff(g, prepend=g.new_zeros(1)) > 0).all() or not torch.isfinite(g).all():
            raise ValueError("`integrated_beta` must be a finite, positive and increasing table of shape (N,).")
        self.process = DiscreteProcess(drift.lam, g, drift.num_times is not None)
        needs_all = self.process.varies or variance_exploding
        enough = len(g) if needs_all else min(len(g), max(1, round(STEPS_PER_G * float(g[-1]))))
        num_steps = enough if num_steps is None else num_steps
        steps_remedy = f"between 1 and the {len(g)} training times"
        if self.process.varies and num_steps != len(g):
            steps_remedy = f"{len(g)}, the number of training times, each of which has its lambda"
        checks = {
            "update": (update, update in UPDATES, f"one of {UPDATES}"),
            "zeta": (
                zeta,
                zeta == 1 or (0 < zeta < 1 and update == "gradient" and not self.process.varies),
                "a number in (0, 1], and 1 for IPF or where lambda varies in time",
            ),
            "zeta_placement": (zeta_placement, zeta_placement in GRADIENTS, f"one of {GRADIENTS}"),
            "prior": (prior, prior in SIMULATION_PRIORS, f"one of {SIMULATION_PRIORS}"),
            "prior_variance": (prior_variance, prior_variance is None or prior_variance > 0, "positive"),
            "num_trajectories": (num_trajectories, num_trajectories >= 1, "at least 1"),
            "num_steps": (num_steps, (len(g) if self.process.varies else 1) <= num_steps <= len(g), steps_remedy),
            "batch_size": (batch_size, batch_size is None or batch_size >= 1, "at least 1"),
            "step_scale": (step_scale, step_scale > 0, "positive"),
            "step_offset": (step_offset, step_offset >= 0, "not negative"),
            "step_power": (step_power, 0.5 < step_power <= 1, "in (0.5, 1] (assumption A5)"),
            "step_count": (step_count, step_count in STEP_COUNTS, f"one of {STEP_COUNTS}"),
            "clip": (clip, clip > 0, "positive"),
        }
        for name, (value, is_valid, remedy) in checks.items():
            if not is_valid:
                raise ValueError(f"`{name}` must be {remedy}, got {value!r}.")
        self.drift = drift
        self.zeta = zeta
        self.zeta_placement = zeta_placement
        self.update_rule = update
        self.prior = prior
        self.prior_variance = prior_variance or (float(g[-1]) if variance_exploding else 1.0)
        self.variance_exploding = variance_exploding
        self.num_trajectories = num_trajectories
        self.batch_size = batch_size or num_trajectories
        self.step_scale, self.step_offset, self.step_power = step_scale, step_offset, step_power
        self.step_count = step_count
        self.clip = clip
        self.seed = seed
        self.num_stages = 0
        self.num_skipped = 0
        self.last_gradient = torch.zeros_like(drift.lam_polyak)
        self.sign_changes = torch.zeros(() if drift.turns else drift.lam.shape, dtype=torch.int64)
        # training times N-1 .. first, and the g that each step goes down to
        self.timesteps = np.linspace(len(g) - 1, -1, num_steps + 1).round().astype(int)[:-1].tolist()
        self.g = g[self.timesteps]
        self.g_next = torch.cat([self.g[1:], g.new_zeros(1)])
        self.weights = ((self.g - self.g_next) / self.g[0]).tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """What a stage leaves for the next one, but for the drift, which has a state of its own."""
        return {
            "counts": torch.tensor([self.num_stages, self.num_skipped]),
            "sign_changes": self.sign_changes,
            "last_gradient": self.last_gradient,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a [`state_dict`]."""
        self.num_stages, self.num_skipped = state["counts"].tolist()
        self.sign_changes, self.last_gradient = state["sign_changes"], state["last_gradient"]

    def step_size(self, count: int | Tensor) -> float | Tensor:
        r"""$\eta_k$ at k = `count`, from 1."""
        return self.step_scale / (count**self.step_power + self.step_offset)

    @torch.no_grad()
    def update(
        self,
        score: ScoreFunction,
        device: torch.device | str = "cpu",
        process_index: int = 0,
        num_processes: int = 1,
        reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        data: Tensor | None = None,
        condition: Tensor | None = None,
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
            data: Samples of the data in the model's units, `(n, *event_shape)`, on `device`, of which every trajectory
                has one in turn: the moment is then divided by the forward process's, see above. It takes as many
                network calls again.
            condition: What the score of each trajectory depends on, `(num_trajectories, ...)`: the score function is
                then called as `score(x, k, condition=...)`, with the rows of its samples. The drift is one for all.

        Returns:
            [`StageOutput`]: moments, step and the new $\lambda$.

        Raises:
            ValueError: Some $\lambda$ is 0, which steps along the gradient cannot leave.
        """
        is_ipf = self.update_rule == "ipf"
        if not is_ipf:
            self.drift.check_can_step()
        self.num_stages += 1
        mine = range(process_index, self.num_trajectories, num_processes)
        drift = self.drift
        shape = (2 if data is None else 3, *drift.lam_polyak.shape)
        # the drift may have been changed by others
        self.process = DiscreteProcess(drift.lam, self.process.table, self.process.varies)
        coefficients = self._coefficients(torch.device(device))
        total = torch.zeros(shape, dtype=torch.float64)
        for start in range(0, len(mine), self.batch_size):
            batch = mine[start : start + self.batch_size]
            given = score if condition is None else functools.partial(score, condition=condition[list(batch)])
            total[:2] += self._simulate(given, batch, *coefficients)
            if data is not None:
                total[2] += self._diffuse(given, batch, data)
        moments = reduce_sum(total) / self.num_trajectories
        skipped = not bool(torch.isfinite(moments).all())
        score_x, x_x = moments[:2]
        if data is not None and not skipped:
            score_x = self._calibrated(score_x, moments[2])
        gradient = torch.zeros_like(score_x) if skipped else self._gradient(score_x, x_x)
        eta: float | Tensor = 0.0 if skipped else 1.0
        if skipped:
            self.num_skipped += 1
            warnings.warn(
                f"Stage {self.num_stages} of stochastic approximation is skipped: the moments of the backward"
                f" trajectories are not finite (lambda is {drift.lam.min():.3g} to {drift.lam.max():.3g}; the"
                " network's score may have blown up). Lambda stays as it was.",
                RuntimeWarning,
                stacklevel=2,
            )
        elif is_ipf:
            drift.move_to(self._minimizer(score_x, x_x))
        else:
            eta = self.step_size(self._count(gradient))
            drift.step(gradient, eta)
        return StageOutput(drift.lam.clone(), score_x, x_x, gradient, eta, skipped)

    def _gradient(self, score_x: Tensor, x_x: Tensor) -> Tensor:
        """Of the loss in A, clipped; with moments in the shape of lambda, or matrices where the axes turn."""
        reference = 0 if self.variance_exploding else 1
        a, turns = (reference - self.drift.lam) / 2, self.drift.turns
        one = torch.eye(len(a), dtype=a.dtype) if turns else torch.ones_like(a)
        a_x_x = a[:, None] * x_x if turns else a * x_x
        if self.zeta_placement == "divergence":
            gradient = score_x + self.zeta * one
        else:
            gradient = one + self.zeta * score_x + (1 - self.zeta) * a_x_x
        if not turns:
            return gradient.clamp(-self.clip, self.clip)
        values, vectors = torch.linalg.eigh((gradient + gradient.T) / 2)
        return (vectors * values.clamp(-self.clip, self.clip)) @ vectors.T

    def _count(self, gradient: Tensor) -> int | Tensor:
        """K of the next step; where the axes turn the gradient is seen along those of the samples."""
        if self.step_count == "stages":
            return int(self.drift.num_updates) + 1
        turns = self.drift.turns
        if turns:
            gradient = self.drift.rotation.T @ gradient @ self.drift.rotation
        agreement = gradient * self.last_gradient
        self.sign_changes = self.sign_changes + ((agreement.sum() if turns else agreement) < 0)
        self.last_gradient = gradient
        return self.sign_changes + 1

    def _minimizer(self, score_x: Tensor, x_x: Tensor) -> Tensor:
        """The lambda at which the loss is least at zeta = 1; where the axes turn D, by Lyapunov's equation."""
        lam = self.drift.lam
        if not self.drift.turns:
            return lam + 2 * (1 + score_x) / x_x
        residual = torch.eye(len(lam), dtype=lam.dtype) + (score_x + score_x.T) / 2
        values, vectors = torch.linalg.eigh((x_x + x_x.T) / 2)
        change = 2 * (vectors.T @ residual @ vectors) / (values[:, None] + values)
        return torch.diag(lam) + 2 * vectors @ change @ vectors.T

    def _coefficients(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of sample, score and noise in a step, which is linear in them: `(num_steps, *lambda_shape or event)`."""
        lam = self.process.lam
        g, scale = self.process.at(torch.tensor([*self.timesteps, -1]))
        data_variance = self.drift.data_variance if self.update_rule == "ipf" else torch.ones(())
        one = torch.ones_like(lam * g[1:] * data_variance)
        # a step of x / scale, whose score is the score of x times the scale
        on_x, variance = process.ancestral_step(lam, g[:-1], g[1:], one, torch.zeros_like(one))
        on_score, _ = process.ancestral_step(lam, g[:-1], g[1:], torch.zeros_like(one), one)
        if self.update_rule == "ipf":  # which compares this law with the forward one: no bias of the step
            variance = process.gaussian_posterior_variance(lam, g[:-1], g[1:], data_variance)
        before, after = scale[:-1], scale[1:]
        rows = (after / before * on_x, after * before * on_score, after * variance.sqrt())
        on_x, on_score, on_noise = (row.to(device, torch.float32) for row in rows)
        return on_x, on_score, on_noise

    def _simulate(
        self, score: ScoreFunction, trajectories: range, on_x: Tensor, on_score: Tensor, on_noise: Tensor
    ) -> Tensor:
        """E[score x] and E[x x] along backward trajectories, summed over these: float64, `(2, *moment)`.

        They are averaged over time, or where lambda varies those of each time; see [`_accumulate`].
        """
        device = on_x.device
        noise = self._noise(trajectories, device)
        basis = self.drift.basis(device, torch.float32)
        mean, scale = (moment.to(device, torch.float32) for moment in self._prior_moments())
        x = mean + scale * next(noise)
        total = torch.zeros((2, *self.drift.lam_polyak.shape), device=device)
        for i, (k, xi) in enumerate(zip(self.timesteps, noise, strict=True)):
            score_x = basis.to_basis(_checked(score(basis.from_basis(x), k), x))
            self._accumulate(total[0], i, score_x, x)
            self._accumulate(total[1], i, x, x)
            x = on_x[i] * x + on_score[i] * score_x + on_noise[i] * xi
        return total.cpu().double()

    def _diffuse(self, score: ScoreFunction, trajectories: range, data: Tensor) -> Tensor:
        """E[score x] under the forward process, as in [`_simulate`]."""
        device = data.device
        noise = self._noise(trajectories, device, forward=True)
        basis = self.drift.basis(device, torch.float32)
        x0 = basis.to_basis(data[torch.tensor(trajectories, device=device) % len(data)].float())
        a, s = (scale.to(device, torch.float32) for scale in self.process.scales(torch.tensor(self.timesteps)))
        total = torch.zeros(self.drift.lam_polyak.shape, device=device)
        for i, (k, xi) in enumerate(zip(self.timesteps, noise, strict=False)):
            x = a[i] * x0 + s[i] * xi
            self._accumulate(total, i, basis.to_basis(_checked(score(basis.from_basis(x), k), x)), x)
        return total.cpu().double()

    def _accumulate(self, total: Tensor, i: int, left: Tensor, right: Tensor) -> None:
        """Add the i-th time's sum over trajectories of `left * right`, or of their outer product where the axes turn.

        Event dimensions that share one lambda are averaged.
        """
        if self.drift.turns:
            moment = left.T @ right
        else:
            shared = [dim + 1 for dim, size in enumerate(self.drift.lambda_shape) if size == 1]
            product = left * right
            moment = (product.mean(shared, keepdim=True) if shared else product).sum(0)
        if self.process.varies:
            total[-1 - i] = moment  # the first training time is the last one visited
        else:
            total += self.weights[i] * moment

    def _calibrated(self, backward: Tensor, forward: Tensor) -> Tensor:
        """E[score x] as it would be if that of the forward process were -1."""
        if not self.drift.turns:
            return -backward / forward
        return -torch.linalg.solve(forward, backward)

    def _noise(self, trajectories: range, device: torch.device, forward: bool = False) -> Iterator[Tensor]:
        """Normal numbers `(n, *event_shape)` of the start and of every step, of each trajectory from its own seed."""
        generators = []
        for trajectory in trajectories:
            key = [self.seed, self.num_stages, trajectory, *([1] if forward else [])]
            entropy = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
            generators.append(torch.Generator().manual_seed(int(entropy) >> 1))
        shape, total = self.drift.event_shape, len(self.timesteps) + 1
        at_once = max(1, NOISE_VALUES // math.prod(shape))
        for first in range(0, total, at_once):
            number = min(at_once, total - first)
            drawn = [torch.randn((number, *shape), generator=generator) for generator in generators]
            yield from torch.stack(drawn, dim=1).to(device)

    def _prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the trajectories' start."""
        zero, one = torch.zeros_like(self.drift.data_mean), torch.ones_like(self.drift.data_mean)
        if self.prior == "standard":
            return zero, one * self.prior_variance**0.5
        data = (self.drift.data_mean, self.drift.data_variance) if self.prior == "marginal" else (zero, zero)
        g, scale = (value[0] for value in self.process.at(torch.tensor(self.timesteps[:1])))
        mean, variance = process.marginal_moments(self.process.lam, g, *data)
        return (scale * mean).expand_as(one), (scale * variance.sqrt()).expand_as(one)


def _checked(score: Tensor, x: Tensor) -> Tensor:
    """What `score` returned, if it has the shape of a score of `x`."""
    if not isinstance(score, Tensor) or score.shape != x.shape:
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"`score` must return a tensor of the samples' shape {tuple(x.shape)}, got {found}.")
    return score
