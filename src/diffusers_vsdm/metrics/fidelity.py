"""How much samples of images look like data, by the features of an Inception network and torch-fidelity.

The Fréchet distance of Gaussians with the features' means and covariances (FID) depends on the number of samples, so
that one from few of them is to be named with their number: [`fid_name`].

References:
    Heusel et al. (2017), "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium": FID.
    Bińkowski et al. (2018), "Demystifying MMD GANs": KID.
    Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric for Assessing Generative Models".
"""

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import write_atomically


FEATURES = "2048"  # torch-fidelity's name of the last pooled layer
ENOUGH = 10_000  # samples for a FID without a warning
LEAST = 4  # samples for precision and recall, which look at the third neighbour of each
KID_SUBSET = 1000
MANY, OTHER_DATA = 2000, 10.0  # so many samples show by such a mean squared z-score that data are others

Features = Callable[[Tensor], Tensor]


def fid_name(num_samples: int, num_reference: int = 0) -> str:
    """`FID`, with the number of samples where these are few, and of the data's if these are known to be few."""
    few = [f"{num_samples:,} samples"] if num_samples < ENOUGH else []
    few += [f"{num_reference:,} of the data"] if 0 < num_reference < ENOUGH else []
    return f"FID ({', '.join(few)})" if few else "FID"


def _torch_fidelity() -> Any:
    try:
        import torch_fidelity
        import torch_fidelity.feature_extractor_inceptionv3
        import torch_fidelity.metric_fid
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that is not for this torch
        raise ImportError(
            f"FID, KID, precision and recall need torch-fidelity, which could not be imported ({error}): pip install"
            " 'diffusers-vsdm[fid]', beside a build of torch that torchvision is made for."
        ) from error
    return torch_fidelity


class InceptionFeatures:
    """The 2048 features of the FID Inception network, as a function of images.

    Args:
        weights (`str` or `Path`, *optional*): The network's weights under torch-fidelity's names, as safetensors or as
            a file of `torch.save`. Scales of the batch norms, which are 1, and the classifier, which is not used, may
            be missing. By default torch-fidelity downloads its own.
        device: Where to compute.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: The file is missing, damaged or of another network.
    """

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        module = _torch_fidelity().feature_extractor_inceptionv3
        make, name = module.FeatureExtractorInceptionV3, "inception-v3-compat"
        if weights is None:
            network = make(name, [FEATURES])
        else:
            state = _complete(_load_weights(Path(weights)))
            with tempfile.NamedTemporaryFile(suffix=".pth") as file:  # the only way in
                torch.save(state, file.name)
                try:
                    network = make(name, [FEATURES], feature_extractor_weights_path=file.name)
                except RuntimeError as error:
                    raise ValueError(
                        f"{weights} does not hold the weights of FID's Inception network: {error}"
                    ) from error
        # on a CPU 1.6 times as fast with the channels last; the features agree to 1e-5
        self.network, self.device = network.to(device, memory_format=torch.channels_last), torch.device(device)

    @cached_property
    def digest(self) -> str:
        """Of the weights, by which statistics are told from those of another network."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.network.state_dict().items()):
            if not key.endswith("num_batches_tracked") and not key.startswith("fc."):
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images of whole numbers 0 to 255.

        Args:
            images (`Tensor`): `(n, C, H, W)` of type `torch.uint8`; gray ones, C = 1, count as colours.

        Returns:
            `(n, 2048)`, float32, on the CPU.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "`images` must be (n, 1 or 3, height, width) of type torch.uint8, got"
                f" {tuple(images.shape)} of {images.dtype}."
            )
        return self.network(images.expand(-1, 3, -1, -1).to(self.device))[0].float().cpu()


def _load_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"There is no file {path} with the weights of the feature network.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"The weights of the feature network, {path}, are damaged ({error}): get them again."
        ) from error


def _complete(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file of features alone leaves out."""
    scales = {
        key.replace("running_mean", "weight"): torch.ones_like(value)
        for key, value in state.items()
        if key.endswith("bn.running_mean")
    }
    classifier = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    return classifier | scales | state


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a data set: a `.npz` file of `mu` and `sigma`, as usual in the field.

    Attributes:
        mean: `(d,)`, float64.
        covariance: `(d, d)`, float64.
        num_samples: Of how many samples; 0 if the file does not say.
        about: What else the file says: `network`, the digest of the features' weights, and the images' `shape`.
    """

    mean: np.ndarray
    covariance: np.ndarray
    num_samples: int = 0
    about: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, features: Tensor, **about: str) -> Self:
        """Of features `(n, d)`.

        Raises:
            ValueError: Fewer than two, or not finite.
        """
        _check(features, "features")
        numbers = features.double().numpy()
        return cls(numbers.mean(0), np.cov(numbers, rowvar=False), len(numbers), tuple(about.items()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ValueError: The file is missing, damaged, or not of this kind.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma"))
                number = int(file["n"]) if "n" in file else 0
                about = tuple((key, str(file[key])) for key in ("network", "shape") if key in file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a whole .npz file of `mu` and `sigma` ({error}).") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path} holds `mu` {mean.shape} and `sigma` {covariance.shape}: (d,) and (d, d) are needed."
            )
        if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise ValueError(f"{path} holds NaN or infinite values.")
        return cls(mean, covariance, number, about)

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all."""
        content = io.BytesIO()
        np.savez(content, mu=self.mean, sigma=self.covariance, n=self.num_samples, **dict(self.about))  # type: ignore[arg-type]
        write_atomically(Path(path), content.getvalue())

    def check(self, features: Tensor | None = None, **about: str) -> None:
        """Refuse statistics of another network or other data.

        Args:
            features: `(n, d)`, of some of the data that they should be of.
            about: What the file should say, if it says it.

        Raises:
            ValueError: They are.
        """
        for key, found in self.about:
            if key in about and found != about[key]:
                raise ValueError(
                    f"The statistics are of another {key}, {found!r} instead of {about[key]!r}: compute them anew."
                )
        if features is None:
            return
        some = FeatureStatistics.of(features[:MANY])
        _check_same(some, self)
        own = 1 / self.num_samples if self.num_samples else 0.0  # of the statistics' own mean
        spread = self.covariance.diagonal().clip(1e-12) * (1 / some.num_samples + own)
        error = (some.mean - self.mean) ** 2 / spread
        if error.mean() > OTHER_DATA:
            raise ValueError(
                f"The statistics are not of these data: their mean is {error.mean() ** 0.5:.0f} standard errors away."
                " Another data set, resolution or way to resize?"
            )


def _check_same(ours: FeatureStatistics, statistics: FeatureStatistics) -> None:
    if len(ours.mean) != len(statistics.mean):
        raise ValueError(
            f"The statistics are of {len(statistics.mean)} features, not {len(ours.mean)}: of another network."
        )


def _check(features: Tensor, name: str, least: int = 2) -> None:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"`{name}` must be (n, d) with n of at least {least}, got {tuple(features.shape)}.")
    if not torch.isfinite(features).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")


def frechet_distance(features: Tensor, statistics: FeatureStatistics) -> float:
    """FID: the Fréchet distance between features `(n, d)` and the statistics of data.

    Raises:
        ValueError: Fewer than two samples, not finite, or of another network.
    """
    ours = FeatureStatistics.of(features)
    _check_same(ours, statistics)
    compared = ({"mu": x.mean, "sigma": x.covariance} for x in (ours, statistics))
    found = _torch_fidelity().metric_fid.fid_statistics_to_metric(*compared, verbose=False)
    return found["frechet_inception_distance"]


def kernel_distance_and_coverage(features: Tensor, reference: Tensor) -> dict[str, float]:
    """KID, precision and recall of features `(n, d)` against those of data `(m, d)`.

    Returns:
        `kid` and `kid_std`, its standard deviation over subsets of half the samples, at most 1,000; `precision` and
        `recall`.

    Raises:
        ValueError: Fewer than four samples, too few for neighbours, or not finite.
    """
    for name, value in {"features": features, "reference": reference}.items():
        _check(value, name, LEAST)
    size = max(2, min(KID_SUBSET, len(features) // 2, len(reference) // 2))
    library = _torch_fidelity()
    kid = library.metric_kid.kid_features_to_metric(features, reference, kid_subset_size=size, verbose=False)
    coverage = library.metric_prc.prc_features_to_metric(features, reference, save_cpu_ram=True, verbose=False)
    return {
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "precision": coverage["precision"],
        "recall": coverage["recall"],
    }
