r"""The learned linear drift of the forward process: $D = I - 2A = \mathrm{diag}(\lambda)$ (Eq. 11, Corollary 1)."""

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .bases import Basis, CosineBasis, IdentityBasis, cosine_matrix, principal_axes
from .files import write_atomically
from .statistics import Moments, Statistics, as_batches


BASES = ("identity", "dct")
AVERAGES = ("polyak", "ema")
LAMBDA_RANGE = (1e-8, 1e8)  # a step cannot leave it: lambda stays positive in any precision


class AdaptiveDiagonalDrift(Statistics):
    r"""Diagonal drift $\lambda$ of the Ornstein-Uhlenbeck process, its running averages, and the moments of the data.

    It is born neutral, $\lambda = 1$, where the process is that of DDPM. [`StochasticApproximation`] moves it. It
    holds statistics and not weights: all tensors are float64 on the CPU, whatever `.to(...)` is asked for, and are
    cast where they are used.

    Args:
        event_shape (`tuple[int, ...]`): Shape of one sample, `(d,)` or `(C, H, W)`.
        lambda_shape (`tuple[int, ...]`, *optional*): Shape of $\lambda$. It has as many dimensions as `event_shape`
            and broadcasts to it: `(1, 1, 1)`, `(C, 1, 1)` or `(C, H, W)` for images. Defaults to `event_shape`.
        basis (`str`, defaults to `"identity"`): Orthonormal basis in which the drift is diagonal: `"identity"`, or
            `"dct"` for images; see [`bases`].
        ema_decay (`float`, defaults to 0.9): Weight of the past in the exponential moving average, in [0, 1).
        averaging_power (`float`, defaults to 3.0): The iterate $\lambda_k$ enters the Polyak-Ruppert average with
            weight $(1 + p)/(k + p)$. 0 is the plain mean of section 4.3; larger values forget the start, as $k^p$
            (Shamir and Zhang 2013).

    Attributes (buffers, also the keys of the file):
        lam, lam_polyak, lam_ema: The current $\lambda$ and its two averages, shape `lambda_shape`.
        num_updates: Number of updates so far.
        data_mean, data_variance: Moments of the (normalised) data in the drift's basis, shape `event_shape`.
        rotation: With the `dct` basis, its rotation of the channels, shape `(C, C)`.

    References:
        Deng et al. (2024), "Variational Schrödinger Diffusion Models", sections 4.1 to 4.3.
        Shamir, Zhang (2013), "Stochastic Gradient Descent for Non-smooth Optimization".
    """

    lam: Tensor
    lam_polyak: Tensor
    lam_ema: Tensor
    num_updates: Tensor
    data_mean: Tensor
    data_variance: Tensor
    rotation: Tensor

    @register_to_config
    def __init__(
        self,
        event_shape: tuple[int, ...],
        lambda_shape: tuple[int, ...] | None = None,
        basis: str = "identity",
        ema_decay: float = 0.9,
        averaging_power: float = 3.0,
    ):
        super().__init__()
        event_shape = tuple(event_shape)
        lambda_shape = event_shape if lambda_shape is None else tuple(lambda_shape)
        if not event_shape or any(size < 1 for size in event_shape):
            raise ValueError(f"`event_shape` must be a non-empty tuple of positive sizes, got {event_shape}.")
        if len(lambda_shape) != len(event_shape) or any(
            n not in (1, size) for n, size in zip(lambda_shape, event_shape, strict=True)
        ):
            raise ValueError(
                f"`lambda_shape` {lambda_shape} does not broadcast to `event_shape` {event_shape}: give as many"
                " dimensions, each of size 1 or that of the event."
            )
        if basis not in BASES:
            raise ValueError(f"`basis` must be one of {BASES}, got {basis!r}.")
        if basis == "dct" and len(event_shape) != 3:
            raise ValueError(f"`basis` 'dct' is for images (channels, height, width), not for events {event_shape}.")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {ema_decay}.")
        if not averaging_power >= 0:
            raise ValueError(f"`averaging_power` must not be negative, got {averaging_power}.")
        # JSON has no tuples; the same types before saving and after loading
        self.register_to_config(event_shape=list(event_shape), lambda_shape=list(lambda_shape))
        for name in ("lam", "lam_polyak", "lam_ema"):
            self.register_buffer(name, torch.ones(lambda_shape, dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("data_mean", torch.zeros(event_shape, dtype=torch.float64))
        self.register_buffer("data_variance", torch.ones(event_shape, dtype=torch.float64))
        if basis == "dct":
            self.register_buffer("rotation", torch.eye(event_shape[0], dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        return self  # float64 has no place on some devices

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.data_mean.shape)

    @property
    def is_neutral(self) -> bool:
        r"""Whether $\lambda = 1$ everywhere, so that the process is that of DDPM."""
        return bool((self.lam == 1).all())

    def basis(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Basis:
        """The change of coordinates between samples and the basis, on a device and in a type."""
        if self.config["basis"] == "identity":
            return IdentityBasis()
        matrices = (self.rotation, cosine_matrix(self.event_shape[1]), cosine_matrix(self.event_shape[2]))
        return CosineBasis(*(matrix.to(device, dtype) for matrix in matrices))

    def set_lambda(self, value: float | Tensor) -> None:
        r"""Set $\lambda$ and restart its averages there; `num_updates` is left as it is.

        Args:
            value (`float` or `Tensor`): Positive and finite, broadcastable to `lambda_shape`.
        """
        value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        if not (torch.isfinite(value) & (value > 0)).all():
            raise ValueError(f"`value` must be positive and finite in every entry, got {value.tolist()}.")
        try:
            value = value.expand(self.lam.shape)
        except RuntimeError as error:
            raise ValueError(
                f"`value` of shape {tuple(value.shape)} does not broadcast to the drift's lambda of shape"
                f" {tuple(self.lam.shape)}."
            ) from error
        for buffer in (self.lam, self.lam_polyak, self.lam_ema):
            buffer.copy_(value)

    def step(self, direction: Tensor, step_size: float) -> None:
        r"""One update, $\log \lambda \mathrel{+}= \eta \, d$ with $d$ the `direction`, then both averages.

        A step on the logarithm is free of scale and keeps $\lambda$ positive.
        """
        if direction.shape != self.lam.shape:
            raise ValueError(f"`direction` has shape {tuple(direction.shape)}, lambda has {tuple(self.lam.shape)}.")
        if not torch.isfinite(direction).all() or not math.isfinite(step_size):
            raise ValueError("`direction` and `step_size` must be finite.")
        self.lam.mul_(torch.exp(step_size * direction.detach().to(self.lam))).clamp_(*LAMBDA_RANGE)
        self.num_updates += 1
        power = self.config["averaging_power"]
        self.lam_polyak.lerp_(self.lam, (1 + power) / (int(self.num_updates) + power))
        self.lam_ema.lerp_(self.lam, 1 - self.config["ema_decay"])

    def average(self, which: str = "polyak") -> Tensor:
        r"""A copy of an average of the iterates, `"polyak"` or `"ema"` (section 4.3)."""
        if which not in AVERAGES:
            raise ValueError(f"`which` must be one of {AVERAGES}, got {which!r}.")
        return getattr(self, f"lam_{which}").clone()

    def fit_moments(self, data: Tensor | Iterable[Tensor]) -> None:
        """Set the data's moments from samples of shape `(n, *event_shape)`, or from batches of them.

        In the `dct` basis the channels are first turned to their principal axes, those of the first batch, so lambda
        must still be neutral.

        Raises:
            ValueError: The samples have another shape, are fewer than two or not finite; or lambda is not neutral.
        """
        if self.config["basis"] == "dct" and not self.is_neutral:
            raise ValueError(
                "The moments turn the basis, so fit them before lambda is learned: it would change meaning."
            )
        moments = Moments(self._in_basis(as_batches(data)))
        mean, variance = moments.pooled(self.event_shape)
        self.data_mean.copy_(mean)
        self.data_variance.copy_(variance)

    def _in_basis(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Batches in float64 and in the basis, whose channels the first of them turns."""
        for i, batch in enumerate(batches):
            if tuple(batch.shape[1:]) != self.event_shape:
                raise ValueError(
                    f"`data` must have shape (n, {', '.join(map(str, self.event_shape))}), got {tuple(batch.shape)}."
                )
            batch = batch.detach().to("cpu", torch.float64)
            if i == 0 and self.config["basis"] == "dct":
                self.rotation.copy_(principal_axes(batch))
            yield self.basis().to_basis(batch)

    def version(self) -> Hashable:
        """Something that changes whenever a tensor is changed in place, for those who keep what they computed."""
        try:
            return tuple((id(b), b._version) for b in self._buffers.values() if b is not None)
        except RuntimeError:  # tensors of inference mode are not counted
            return self.digest()

    # The file that travels with a scheduler ------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The drift as one safetensors file, its configuration in the metadata; equal drifts give equal bytes."""
        config = {name: self.config[name] for name in sorted(self._get_init_keys(type(self)) - {"self"})}
        return safetensors.torch.save(self.state_dict(), metadata={"config": json.dumps(config, sort_keys=True)})

    def digest(self) -> str:
        """SHA-256 of [`to_bytes`], in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save_file(self, path: str | Path) -> None:
        """Write [`to_bytes`] to `path`, whole or not at all; missing folders are made."""
        write_atomically(Path(path), self.to_bytes())

    @classmethod
    def load_file(cls, path: str | Path) -> Self:
        """Read a drift that [`save_file`] wrote.

        Raises:
            ValueError: The file is damaged, or it is not a drift.
            FileNotFoundError: There is no such file.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                config = json.loads((file.metadata() or {})["config"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            drift = cls(**config)
            drift.load_state_dict(tensors)
        except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The drift file {path} is damaged or is not a drift ({error}). Download or save it again."
            ) from error
        positive = (drift.lam, drift.lam_polyak, drift.lam_ema)
        if not all((b > 0).all() for b in positive) or not all(torch.isfinite(b).all() for b in drift.buffers()):
            raise ValueError(
                f"The drift file {path} holds values that are not finite, or a lambda that is not positive."
            )
        return drift
