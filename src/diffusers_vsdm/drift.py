r"""The learned linear drift of the forward process: $D = I - 2A = \mathrm{diag}(\lambda)$ (Eq. 11, Corollary 1)."""

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .bases import (
    Basis,
    CosineBasis,
    IdentityBasis,
    RotatedBasis,
    cosine_matrix,
    principal_axes,
)
from .files import write_atomically
from .statistics import Moments, Statistics, as_batches


BASES = ("identity", "dct", "dense")
AVERAGES = ("polyak", "ema", "last")
LAMBDA_RANGE = (1e-8, 1e8)  # a step cannot leave it: lambda stays positive in any precision


class AdaptiveDiagonalDrift(Statistics):
    r"""Diagonal drift $\lambda$ of the Ornstein-Uhlenbeck process, its running averages, and the moments of the data.

    It is born neutral, $\lambda = 1$, where the process is that of DDPM; at $\lambda = 0$, which can be set, it is the
    variance-exploding one. [`StochasticApproximation`] moves it. It holds statistics and not weights: all tensors are
    float64 on the CPU, whatever `.to(...)` is asked for, and are cast where they are used.

    In the `dense` basis the drift is any symmetric positive definite matrix $D = U \mathrm{diag}(\lambda) U^T$ (the
    general transport of appendix D.1, whose antisymmetric part vanishes where the marginals match), and its axes are
    learned too; $\lambda$ and the data's moments are always in the axes of the moment. With `num_times` the axes stay
    those of the data.

    Args:
        event_shape (`tuple[int, ...]`): Shape of one sample, `(d,)` or `(C, H, W)`.
        lambda_shape (`tuple[int, ...]`, *optional*): Shape of $\lambda$. It has as many dimensions as `event_shape`
            and broadcasts to it: `(1, 1, 1)`, `(C, 1, 1)` or `(C, H, W)` for images. Defaults to `event_shape`.
        basis (`str`, defaults to `"identity"`): Orthonormal basis in which the drift is diagonal: `"identity"`, or
            `"dct"` for images, or `"dense"` for vectors; see [`bases`].
        num_times (`int`, *optional*): One $\lambda$ for each of so many training times, that between $g_{k-1}$ and
            $g_k$ for the k-th. Defaults to one for all (Corollary 1).
        ema_decay (`float`, defaults to 0.9): Weight of the past in the exponential moving average, in [0, 1).
        averaging_power (`float`, defaults to 3.0): The iterate $\lambda_k$ enters the Polyak-Ruppert average with
            weight $(1 + p)/(k + p)$. 0 is the plain mean of section 4.3; larger values forget the start, as $k^p$
            (Shamir and Zhang 2013).

    Attributes (buffers, also the keys of the file):
        lam: The current $\lambda$, shape `lambda_shape`, or `(num_times, *lambda_shape)`.
        lam_polyak, lam_ema: Its two averages, in the same shape; where the axes turn those of D itself, `(d, d)`.
        num_updates: Number of updates so far.
        data_mean, data_variance: Moments of the (normalised) data in the drift's basis, shape `event_shape`.
        rotation: With the `dct` basis its rotation of the channels, `(C, C)`; with `dense` the axes as rows, `(d, d)`.
        data_covariance: With `dense`, of the data along the axes, `(d, d)`.

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
    data_covariance: Tensor

    @register_to_config
    def __init__(
        self,
        event_shape: tuple[int, ...],
        lambda_shape: tuple[int, ...] | None = None,
        basis: str = "identity",
        ema_decay: float = 0.9,
        averaging_power: float = 3.0,
        num_times: int | None = None,
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
        if basis == "dense" and (len(event_shape) != 1 or lambda_shape != event_shape):
            raise ValueError(
                f"`basis` 'dense' is for vectors (d,) with a lambda for each, got events {event_shape} and"
                f" `lambda_shape` {lambda_shape}."
            )
        if num_times is not None and num_times < 1:
            raise ValueError(f"`num_times` must be positive or None, got {num_times}.")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {ema_decay}.")
        if not averaging_power >= 0:
            raise ValueError(f"`averaging_power` must not be negative, got {averaging_power}.")
        # JSON has no tuples; the same types before saving and after loading
        self.register_to_config(event_shape=list(event_shape), lambda_shape=list(lambda_shape))
        start = torch.ones(lambda_shape if num_times is None else (num_times, *lambda_shape), dtype=torch.float64)
        self.register_buffer("lam", start)
        for name in ("lam_polyak", "lam_ema"):
            self.register_buffer(name, torch.diag(start) if self.turns else start.clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("data_mean", torch.zeros(event_shape, dtype=torch.float64))
        self.register_buffer("data_variance", torch.ones(event_shape, dtype=torch.float64))
        if basis != "identity":
            self.register_buffer("rotation", torch.eye(event_shape[0], dtype=torch.float64))
        if basis == "dense":
            self.register_buffer("data_covariance", torch.eye(event_shape[0], dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        return self  # float64 has no place on some devices

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.data_mean.shape)

    @property
    def lambda_shape(self) -> tuple[int, ...]:
        r"""Shape of $\lambda$ at one time."""
        return tuple(self.config["lambda_shape"])

    @property
    def num_times(self) -> int | None:
        r"""Number of training times with a $\lambda$ of their own; None if it does not vary."""
        return self.config["num_times"]

    @property
    def turns(self) -> bool:
        """Whether the axes are learned."""
        return self.config["basis"] == "dense" and self.num_times is None

    @property
    def matrix(self) -> Tensor:
        r"""$D = U \mathrm{diag}(\lambda) U^T$ in the samples' own coordinates, `(d, d)`; where the axes turn."""
        return self.rotation.T @ (self.lam[:, None] * self.rotation)

    @property
    def is_neutral(self) -> bool:
        r"""Whether $\lambda = 1$ everywhere, so that the process is that of DDPM."""
        return bool((self.lam == 1).all())

    def basis(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Basis:
        """The change of coordinates between samples and the basis, on a device and in a type."""
        if self.config["basis"] == "identity":
            return IdentityBasis()
        if self.config["basis"] == "dense":
            return RotatedBasis(self.rotation.to(device, dtype))
        matrices = (self.rotation, cosine_matrix(self.event_shape[1]), cosine_matrix(self.event_shape[2]))
        return CosineBasis(*(matrix.to(device, dtype) for matrix in matrices))

    def set_lambda(self, value: float | Tensor) -> None:
        r"""Set $\lambda$ and restart its averages there; `num_updates` is left as it is.

        Args:
            value (`float` or `Tensor`): Not negative, and finite; broadcastable to `lam`. Where the axes turn, also
                the matrix D in the samples' own coordinates, `(d, d)`, symmetric and positive semidefinite. At 0 there
                is no [`step`].
        """
        value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        is_matrix = self.turns and value.ndim == 2
        if is_matrix and (value.shape != self.rotation.shape or not torch.allclose(value, value.T)):
            raise ValueError(
                f"`value` must be numbers or a symmetric matrix {tuple(self.rotation.shape)}, got {value.tolist()}."
            )
        values = torch.linalg.eigvalsh(value) if is_matrix else value
        if not (torch.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"`value` must be finite and not negative in every entry, got {value.tolist()}.")
        try:
            value = value if is_matrix else value.expand(self.lam.shape)
        except RuntimeError as error:
            raise ValueError(
                f"`value` of shape {tuple(value.shape)} does not broadcast to the drift's lambda of shape"
                f" {tuple(self.lam.shape)}."
            ) from error
        if is_matrix:
            self._diagonalize(self.rotation @ value @ self.rotation.T)
        else:
            self.lam.copy_(value)
        for buffer in (self.lam_polyak, self.lam_ema):
            buffer.copy_(self._averaged())

    def step(self, direction: Tensor, step_size: float | Tensor) -> None:
        r"""One update, $\log \lambda \mathrel{+}= \eta \, d$ with $d$ the `direction`, then both averages.

        A step on the logarithm is free of scale and keeps $\lambda$ positive; each may have a size of its own. Where
        the axes turn the direction is a symmetric matrix along the axes, with one size, and the step
        $D \leftarrow D^{1/2} e^{\eta d} D^{1/2}$, diagonalised again.

        Raises:
            ValueError: Some $\lambda$ is 0, which no such step leaves; or an argument is not finite.
        """
        self._check_update("direction", direction)
        self.check_can_step()
        size = torch.as_tensor(step_size, dtype=self.lam.dtype, device=self.lam.device)
        if not torch.isfinite(size).all():
            raise ValueError(f"`step_size` must be finite, got {step_size}.")
        change = size * direction.detach().to(self.lam)
        if self.turns:
            root = self.lam.sqrt()
            self.move_to(root[:, None] * torch.linalg.matrix_exp(change) * root)
        else:
            self.move_to((self.lam * torch.exp(change)).clamp(*LAMBDA_RANGE))

    def check_can_step(self) -> None:
        r"""Raise a ValueError if some $\lambda$ is 0, which a step on its logarithm cannot leave."""
        if not (self.lam > 0).all():
            raise ValueError(
                "Some lambda of the drift is 0, and a step on its logarithm cannot leave that: start above it, with"
                " `drift.set_lambda(...)`; over a table of sigmas 1 / sigma_max**2 is a good start."
            )

    def move_to(self, value: Tensor) -> None:
        r"""One update to a new $\lambda$ (where the axes turn D along them, a symmetric matrix), and both averages.

        Values that are not positive end at a bound near 0.
        """
        self._check_update("value", value)
        if self.turns:
            self._diagonalize(value.detach().to(self.lam))
        else:
            self.lam.copy_(value)
        self.lam.clamp_(*LAMBDA_RANGE)
        self.num_updates += 1
        power = self.config["averaging_power"]
        self.lam_polyak.lerp_(self._averaged(), (1 + power) / (int(self.num_updates) + power))
        self.lam_ema.lerp_(self._averaged(), 1 - self.config["ema_decay"])

    def average(self, which: str = "polyak") -> Tensor:
        r"""A copy of an average of the iterates, `"polyak"` or `"ema"` (section 4.3), or of the `"last"` one.

        Where the axes turn it is that of D, `(d, d)` in the samples' own coordinates.
        """
        if which not in AVERAGES:
            raise ValueError(f"`which` must be one of {AVERAGES}, got {which!r}.")
        return self._averaged().clone() if which == "last" else getattr(self, f"lam_{which}").clone()

    def _averaged(self) -> Tensor:
        """What the averages are taken of."""
        return self.matrix if self.turns else self.lam

    def _check_update(self, name: str, value: Tensor) -> None:
        shape = self.lam_polyak.shape  # of D where the axes turn
        if value.shape != shape:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}, it must be {tuple(shape)}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"`{name}` must be finite.")

    def _diagonalize(self, matrix: Tensor) -> None:
        """Turn the axes to the eigenvectors of a matrix that is given along the present ones."""
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        # each axis keeps its rank and its sense, so that lambda can be followed over the updates
        ranks = self.lam.argsort(stable=True).argsort()
        values, vectors = values[ranks], vectors[:, ranks]
        self.lam.copy_(values.clamp(min=0))  # a lambda of 0 may be rounded to less
        self._turn((vectors * torch.where(vectors.diagonal() < 0, -1.0, 1.0)).T)

    def _turn(self, turn: Tensor) -> None:
        """Turn the axes, and with them the data's moments."""
        self.rotation.copy_(turn @ self.rotation)
        self.data_mean.copy_(turn @ self.data_mean)
        self.data_covariance.copy_(turn @ self.data_covariance @ turn.T)
        self.data_variance.copy_(self.data_covariance.diagonal())

    def fit_moments(self, data: Tensor | Iterable[Tensor]) -> None:
        """Set the data's moments from samples of shape `(n, *event_shape)`, or from batches of them.

        The axes of the `dense` basis are turned to the data's principal ones, and in the `dct` basis the channels to
        theirs, so lambda must still be one number for all dimensions.

        Raises:
            ValueError: The samples have another shape, are fewer than two or not finite; or lambda differs between
                dimensions.
        """
        if self.config["basis"] != "identity" and not (self.lam == self.lam.flatten()[0]).all():
            raise ValueError(
                "The moments turn the basis, so fit them before lambda is learned: it would change meaning."
            )
        batches = self._checked(as_batches(data))
        if self.config["basis"] == "identity":
            moments = Moments(batches)
            mean, variance = moments.pooled(self.event_shape)
            self.data_mean.copy_(mean)
            self.data_variance.copy_(variance)
            return
        # all products along axes that are not turned tell how to turn them
        unturned = type(self)(self.event_shape, basis=self.config["basis"]).basis()
        moments = Moments(map(unturned.to_basis, batches), full=True)
        self.rotation.copy_(torch.eye(len(self.rotation)))
        self.data_mean.copy_(moments.mean)
        if self.config["basis"] == "dense":
            self.data_covariance.copy_(moments.covariance())
            self._turn(principal_axes(moments.covariance()))
            return
        turn = principal_axes(_channel_scatter(moments))
        self.rotation.copy_(turn)
        self.data_mean.copy_(torch.einsum("ic,c...->i...", turn, moments.mean))
        self.data_variance.copy_(torch.einsum("ic,cd...,id->i...", turn, moments.covariance(), turn))

    def _checked(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Batches in float64, of the right shape."""
        for batch in batches:
            if tuple(batch.shape[1:]) != self.event_shape:
                raise ValueError(
                    f"`data` must have shape (n, {', '.join(map(str, self.event_shape))}), got {tuple(batch.shape)}."
                )
            yield batch.detach().to("cpu", torch.float64)

    def version(self) -> Hashable:
        """Something that changes whenever a tensor is changed in place, for those who keep what they computed."""
        try:
            return tuple((id(b), b._version) for b in self._buffers.values() if b is not None)
        except RuntimeError:  # tensors of inference mode are not counted
            return self.digest()

    # The file that travels with a scheduler ------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The drift as one safetensors file, its configuration in the metadata; equal drifts give equal bytes."""
        names = sorted(self._get_init_keys(type(self)) - {"self"})
        config = {name: self.config[name] for name in names if self.config[name] is not None}
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
        averages = (drift.lam_polyak, drift.lam_ema)
        rates = (drift.lam, *(b.diagonal() if drift.turns else b for b in averages))
        if not all((b >= 0).all() for b in rates) or not all(torch.isfinite(b).all() for b in drift.buffers()):
            raise ValueError(f"The drift file {path} holds values that are not finite, or a negative lambda.")
        return drift


def _channel_scatter(moments: Moments) -> Tensor:
    """Products of the channels' deviations, over all pixels, from `full` moments in the cosine basis: `(C, C)`."""
    varying = moments.mean.flatten(1)[:, 1:]  # over an image; the first frequency is the mean of its pixels
    return moments.squares.flatten(2).sum(2) + moments.count * varying @ varying.T
