"""The forward half of `VSDMScheduler`: the process with its table and its drift, without solvers."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import process
from ..bases import Basis, IdentityBasis
from ..discrete import DiscreteProcess, integrated_beta_at
from ..drift import AdaptiveDiagonalDrift
from ..statistics import as_batches
from .drift_owner import DriftOwner
from .marginals import Marginals
from .parameterization import PARAMETERIZATIONS, SIGMA_DATA, Parameterization, edm
from .tables import LEARNED


class ForwardProcess(DriftOwner):
    """Base of schedulers: noise is added by a table of betas or sigmas, and the rates of a drift.

    Attributes:
        betas (`Tensor`): The table of betas, `(N,)` in float32; see [`NoiseTable`].
        integrated_beta (`Tensor`): $g_k$ at the training times, `(N,)` in float64.
    """

    betas: Tensor
    integrated_beta: Tensor

    def __len__(self) -> int:
        return len(self.betas)

    def marginal_scales(self, sample: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        r"""$a_t$ and $s_t$ of $x_t = a_t x_0 + s_t \epsilon$ (Corollary 1), broadcastable to `sample` in [`basis`].

        Args:
            sample (`Tensor`): Samples `(batch, *event_shape)`, for shape, device and type (float32 at least).
            timesteps (`Tensor`): Training steps `(batch,)`, or one for all; fractional ones lie between two.
        """
        self._check_event(sample)
        at = self._marginals(sample, at_least_float32(sample.dtype))
        return at.scales(self._training_times(timesteps, sample))

    @property
    def parameterization(self) -> Parameterization:
        """What the network predicts (`prediction_type`), as functions."""
        if self._internal_dict["prediction_type"] == "edm":
            return self._cached("edm", lambda: edm(self._data_power()))
        return PARAMETERIZATIONS[self._internal_dict["prediction_type"]]

    def _data_power(self) -> Tensor:
        """$E x_0^2$ in the basis for `edm`: a scalar where it is one number for all dimensions."""
        sigma_data, drift = self._internal_dict["sigma_data"], self._drift
        if drift is None or sigma_data is not None:
            return torch.tensor(sigma_data or SIGMA_DATA, dtype=torch.float64) ** 2
        power = drift.data_mean**2 + drift.data_variance
        one = power.flatten()[0]
        return one if (power == one).all() else power

    def integrated_beta_at(self, timesteps: Tensor | int) -> Tensor:
        r"""$g_t$ at training steps, whole or between two; their shape, in float64.

        It is $-\log\bar\alpha_t$ of a table of betas, and $\sigma_t^2$ of one of sigmas.
        """
        return integrated_beta_at(torch.as_tensor(timesteps).cpu(), self.integrated_beta)

    def beta_at(self, timesteps: Tensor) -> Tensor:
        r"""$\beta_t$ per unit of time, averaged over each training interval of length 1 / N; shape of `timesteps`."""

        def make() -> Tensor:
            g = self.integrated_beta
            return (torch.diff(g, prepend=g.new_zeros(1)) * len(self)).float().to(timesteps.device)

        return self._cached(("beta", timesteps.device), make)[timesteps]

    @property
    def is_variance_exploding(self) -> bool:
        r"""Whether the table is one of sigmas (`trained_sigmas`): then $\lambda = 0$ without a drift, and 1 else."""
        return self._internal_dict.get("trained_sigmas") is not None

    @property
    def _neutral_lambda(self) -> Tensor:
        return torch.tensor(0.0 if self.is_variance_exploding else 1.0, dtype=torch.float64)

    @property
    def mean_lambda(self) -> Tensor:
        r"""The mean of all $\lambda$, a scalar in float64; without a drift 1, or 0 with a table of sigmas."""
        return self._neutral_lambda if self._drift is None else self._drift.lam.mean()

    def basis(self, like: Tensor) -> Basis:
        """The coordinates in which the process is elementwise, for tensors like this one.

        Where lambda is one number the process is the same in every basis, and this is the identity; unless the
        network's preconditioning has a number for each dimension.
        """
        return self._basis(like, self._lambda_for_network())

    def _lambda_for_network(self) -> Tensor:
        """Lambda, shaped as the event unless one number serves for all dimensions wherever the network enters."""

        def make() -> Tensor:
            lam = self._process().lam
            is_edm = self._internal_dict["prediction_type"] == "edm"
            return lam.reshape(lam.shape or [1] * self._data_power().ndim) if is_edm else lam

        return self._cached("lambda_for_network", make)

    def _basis(self, like: Tensor, lam: Tensor) -> Basis:
        drift = self._drift
        if drift is None or lam.ndim == 0:
            return IdentityBasis()
        return self._cached(("basis", like.device, like.dtype), lambda: drift.basis(like.device, like.dtype))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""$x_t = a_t x_0 + s_t \epsilon$ (Eq. 13 to 15).

        Args:
            original_samples, noise (`Tensor`): Data and standard normal noise, `(batch, *event_shape)`.
            timesteps (`Tensor`): Training steps, `(batch,)`; fractional ones lie between two.

        Raises:
            ValueError: The shapes or devices disagree, or a timestep lies outside the table.
        """
        check_agree(noise=noise, original_samples=original_samples)
        self._check_event(original_samples)
        dtype = original_samples.dtype

        def make() -> tuple[Basis, torch.dtype, Marginals]:
            basis = self._basis(original_samples.to(at_least_float32(dtype)), self._process().lam)
            computed_in = dtype if isinstance(basis, IdentityBasis) else at_least_float32(dtype)
            return basis, computed_in, self._marginals(original_samples, computed_in)

        # one look at the cache, for small samples
        basis, computed_in, at = self._cached(("forward", original_samples.device, dtype, original_samples.ndim), make)
        a, s = at.scales(self._training_times(timesteps, original_samples))
        x0, eps = (basis.to_basis(x.to(computed_in)) for x in (original_samples, noise))
        return basis.from_basis((x0 * a).addcmul_(eps, s)).to(dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""$v = a_t \epsilon - s_t x_0$, the target of `v_prediction`; shapes as in [`add_noise`]."""
        a, s = self.marginal_scales(sample, timesteps)
        basis = self._basis(s, self._process().lam)
        x0, eps = (basis.to_basis(x.to(s.dtype)) for x in (sample, noise))
        return basis.from_basis(PARAMETERIZATIONS["v_prediction"].target(x0, eps, a, s)).to(sample.dtype)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """What the network sees of $x_t$: the sample itself, but scaled to size 1 for the prediction type `edm`.

        Args:
            sample (`Tensor`): $x_t$, `(batch, *event_shape)`.
            timestep (`Tensor` or `int`): Training steps, `(batch,)` or one for all; fractional ones lie between two.
                Needed for `edm` alone.

        Raises:
            ValueError: It is needed and not given.
        """
        scale = self.parameterization.input_scale
        if scale is None:
            return sample
        if timestep is None:
            raise ValueError("`timestep` is needed to scale the network's input for `prediction_type` 'edm'.")
        a, s = self.marginal_scales(sample, timestep)
        basis = self.basis(s)
        return basis.from_basis(basis.to_basis(sample.to(s.dtype)) * scale(a, s)).to(sample.dtype)

    def get_score(self, model_output: Tensor, timesteps: Tensor | int, sample: Tensor) -> Tensor:
        r"""The score $-\hat\epsilon / s_t$ of Eq. 17 and 18 that a network's output stands for, without clipping.

        Args:
            model_output, sample (`Tensor`): The network's output and its input $x_t$, `(batch, *event_shape)`.
            timesteps (`Tensor` or `int`): Integer training steps, `(batch,)` or one for all.
        """
        model_output, _ = self._split_variance(model_output, sample)
        a, s = self.marginal_scales(sample, timesteps)
        basis = self.basis(s)
        output, x = (basis.to_basis(x.to(s.dtype)) for x in (model_output, sample))
        eps = self.parameterization.eps(output, x, a, s)
        return basis.from_basis(process.conditional_score(eps, s))

    def shift_score(self, model_output: Tensor, change: Tensor, timesteps: Tensor | int, sample: Tensor) -> Tensor:
        """The network's output that stands for a score changed by this much; see [`get_score`].

        Args:
            model_output, change, sample (`Tensor`): Output, change of the score, and $x_t$, `(batch, *event_shape)`.
            timesteps (`Tensor` or `int`): Training steps, `(batch,)` or one for all.
        """
        a, s = self.marginal_scales(sample, timesteps)
        basis = self.basis(s)
        _, eps_per_unit = self.parameterization.eps_terms(a, s)
        # where the network has no say, in dimensions that `edm` knows not to vary, nothing is shifted
        units = torch.where(eps_per_unit == 0, 0.0, s / eps_per_unit)
        return model_output - basis.from_basis(basis.to_basis(change.to(s.dtype)) * units)

    def fit_moments(self, data: Tensor | Iterable[Tensor], basis: str = "dct") -> None:
        r"""Start from the marginal prior $N(a_T m, a_T^2 v + s_T^2)$ of this data from now on.

        A repair for existing models whose table leaves some signal at its last time (Lin et al. 2023): the network is
        trained on $x_T$ with that signal, but sampling starts from N(0, I) without it, which costs contrast and
        brightness where $a_T^2 v$ is not small. The process, the solver and the network stay as they are. In a
        pipeline of another class pass `latents` drawn by [`sample_prior`].

        Args:
            data (`Tensor` or batches of them): What the network was trained on, images in [-1, 1] or scaled latents,
                `(n, *event_shape)`; some hundreds will do.
            basis (`str`, defaults to `"dct"`): Basis of the moments, where there is no drift yet. Images are
                uncorrelated in `"dct"`, nearly, and not in `"identity"`; vectors have only the latter.

        Raises:
            ValueError: The network's preconditioning goes by the moments that there are (`edm` without `sigma_data`);
                or there are fewer than two samples, or ones that are not finite or of another shape.
            TypeError: `data` is neither a tensor nor batches of them.
        """
        config = self._internal_dict
        if config["prediction_type"] == "edm" and config["sigma_data"] is None:
            raise ValueError(
                "The network was trained with `edm` preconditioning by other moments: set `sigma_data` to what it was"
                f" trained with ({SIGMA_DATA} without a drift)."
            )
        drift = self._drift
        if drift is None:
            first, batches = itertools.tee(as_batches(data))
            if (example := next(first, None)) is None:
                raise ValueError("`data` is empty: two samples or more are needed.")
            shape = tuple(example.shape[1:])
            drift = AdaptiveDiagonalDrift(shape, (1,) * len(shape), basis=basis)
            drift.set_lambda(self.mean_lambda)
            data = batches
        drift.fit_moments(data)
        self.set_drift(drift)
        self._register(prior_type="marginal")

    def _process(self) -> DiscreteProcess:
        """The process at the training times in float64; its lambda is a scalar where all dimensions share one."""

        def make() -> DiscreteProcess:
            if self._drift is None:
                return DiscreteProcess(self._neutral_lambda, self.integrated_beta)
            lam = self._drift.lam
            one = lam.flatten()[0]
            if (lam == one).all():
                return DiscreteProcess(one.clone(), self.integrated_beta)
            return DiscreteProcess(lam, self.integrated_beta, self._drift.num_times is not None)

        return self._cached("process", make)

    def _marginals(self, like: Tensor, dtype: torch.dtype) -> Marginals:
        """The process for samples like this one, with scales of this type."""
        return self._cached(
            ("marginals", like.device, dtype, like.ndim),
            lambda: Marginals(self._process(), like, dtype),
        )

    def _training_times(self, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """A batch of training times, or one for all, beside the samples."""
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        if timesteps.numel() not in (1, len(like)):
            raise ValueError(
                f"`timesteps` must be training steps, one or one for each of {len(like)} samples, got"
                f" {timesteps.numel()}."
            )
        if timesteps.device.type == "cpu":
            least, most = timesteps.aminmax()
            if least < 0 or most > len(self.betas) - 1:
                raise ValueError(f"`timesteps` must lie in [0, {len(self)}), got {timesteps.tolist()}.")
        return timesteps.to(like.device)

    def _split_variance(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network's prediction and, from its second half of channels, its variance if it learns one."""
        channels = sample.shape[1]
        if self._internal_dict["variance_type"] in LEARNED and model_output.shape[1] == 2 * channels:
            return model_output[:, :channels], model_output[:, channels:]
        return model_output, None

    def _check_event(self, sample: Tensor, name: str = "sample") -> None:
        if self._drift is not None and tuple(sample.shape[1:]) != self._drift.event_shape:
            raise ValueError(
                f"`{name}` has shape {tuple(sample.shape)}, but the drift is for (batch, "
                f"{', '.join(map(str, self._drift.event_shape))})."
            )


def check_agree(**tensors: Tensor) -> None:
    """Raise a ValueError unless two tensors, given by name, have one shape and one device."""
    (first, x), (second, y) = tensors.items()
    if x.shape != y.shape:
        raise ValueError(f"`{first}` of shape {tuple(x.shape)} and `{second}` of shape {tuple(y.shape)} must agree.")
    if x.device != y.device:
        raise ValueError(f"`{first}` on {x.device} and `{second}` on {y.device} must be on one device.")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in, for samples of this one."""
    return torch.float32 if dtype.itemsize < 4 else dtype
