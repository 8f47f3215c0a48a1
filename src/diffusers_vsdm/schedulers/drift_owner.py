"""A scheduler that owns a drift: keeping, saving and loading it with the configuration."""

import copy
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..drift import AdaptiveDiagonalDrift
from .foreign import foreign_settings


# nested, and with a dot in the folder's name: otherwise the Hub's download filter takes the file for model weights
DRIFT_FOLDER, DRIFT_FILE = "vsdm.drift", "drift.safetensors"


class _ConfigOfDrift(FrozenDict):
    """A scheduler's configuration that still refers to the live drift, so that `from_config` can keep it."""

    drift: AdaptiveDiagonalDrift | None = None


class DriftOwner(SchedulerMixin, ConfigMixin):
    """Base of schedulers with a drift. Their configuration has the key `drift_sha256`."""

    _drift: AdaptiveDiagonalDrift | None
    _caches: dict[Hashable, Any]

    @property
    def drift(self) -> AdaptiveDiagonalDrift | None:
        r"""The drift, which may be changed in place at any time; None for $\lambda = 1$, or 0 with sigmas."""
        return self._drift

    def set_drift(self, drift: AdaptiveDiagonalDrift | None) -> None:
        """Make `drift` this scheduler's own: it is used, saved and loaded with it from now on, and not copied."""
        if drift is not None and not isinstance(drift, AdaptiveDiagonalDrift):
            raise TypeError(f"`drift` must be an AdaptiveDiagonalDrift or None, got {type(drift).__name__}.")
        self._drift = drift
        self._caches = {}

    @property
    def config(self) -> FrozenDict:
        """The configuration, with the digest of the drift as it is now; it refers to the live drift."""
        digest = None if self._drift is None else self._cached("digest", self._drift.digest)
        if self._internal_dict.get("drift_sha256") != digest:
            self._register(drift_sha256=digest)
        config = _ConfigOfDrift(self._internal_dict)
        object.__setattr__(config, "drift", self._drift)
        return config

    def _register(self, **settings: Any) -> None:
        """Change the configuration so that `from_config`, which passes over defaults, keeps the change."""
        defaults = [key for key in self._internal_dict.get("_use_default_values", []) if key not in settings]
        self.register_to_config(**settings, _use_default_values=defaults)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in Diffusers; the drift of `config` (of a live scheduler) or `drift=` comes along, copied.

        Of another class's configuration the process is kept, and what it says of clipping and of Karras's or
        exponential steps.

        Raises:
            ValueError: The configuration names a drift by its digest, and no such drift is at hand; or it is of a
                class with another kind of process.
        """
        drift = kwargs.pop("drift", getattr(config, "drift", None))
        digest = kwargs.get("drift_sha256", config.get("drift_sha256") if isinstance(config, dict) else None)
        if "drift_sha256" in kwargs and digest is None:
            drift = None
        if digest is not None and drift is None:
            raise ValueError(
                f"The configuration belongs to a learned drift (drift_sha256={digest[:12]}...) that did not come with"
                " it. Pass `scheduler.config` itself, `drift=scheduler.drift`, or load with `from_pretrained`; to go"
                " without the drift, pass `drift_sha256=None` and `prior_type='conditional'`."
            )
        kwargs = foreign_settings(config, kwargs) | kwargs
        result = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = result[0] if return_unused_kwargs else result
        scheduler.set_drift(copy.deepcopy(drift))
        return result

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration and, beside it, the drift."""
        _ = self.config  # brings the digest up to date
        path = Path(save_directory) / DRIFT_FOLDER / DRIFT_FILE
        if self._drift is None:
            path.unlink(missing_ok=True)  # of an earlier save
        else:
            self._drift.save_file(path)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load the configuration and its drift from a folder or the Hub, as any Diffusers scheduler.

        Raises:
            FileNotFoundError: The configuration names a drift and its file is missing.
            ValueError: The drift's file is damaged, or is another drift.
        """
        hub_keys = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if key in kwargs}
        config, kwargs, commit = cls.load_config(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            return_unused_kwargs=True,
            return_commit_hash=True,
            **kwargs,
        )
        if kwargs.get("drift_sha256", config.get("drift_sha256")) is not None and "drift" not in kwargs:
            if commit is not None:
                hub_kwargs["revision"] = commit
            kwargs["drift"] = cls._load_drift(str(pretrained_model_name_or_path), subfolder, config, hub_kwargs)
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @staticmethod
    def _load_drift(source: str, subfolder: str | None, config: dict, hub_kwargs: dict) -> AdaptiveDiagonalDrift:
        folder = Path(source).parent if os.path.isfile(source) else Path(source)
        if folder.is_dir():
            inner = folder / (subfolder or "")
            path = (inner if (inner / SCHEDULER_CONFIG_NAME).is_file() else folder) / DRIFT_FOLDER / DRIFT_FILE
        else:
            nested = "/".join(part for part in (subfolder, DRIFT_FOLDER) if part)
            try:
                path = Path(hf_hub_download(source, filename=DRIFT_FILE, subfolder=nested, **hub_kwargs))
            except EntryNotFoundError:
                path = Path(source) / nested / DRIFT_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"The scheduler's configuration names a learned drift, but {path} is missing. Copy the whole"
                f" scheduler folder with its {DRIFT_FOLDER}/, or pass `drift_sha256=None` and"
                " `prior_type='conditional'` to go without the drift."
            )
        drift = AdaptiveDiagonalDrift.load_file(path)
        if drift.digest() != config["drift_sha256"]:
            raise ValueError(
                f"The drift file {path} is not the one that the configuration names (drift_sha256 differs): the"
                " files come from two different saves."
            )
        return drift

    def _cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, kept until the drift changes."""
        drift = self._drift
        version = None if drift is None else drift.version()
        if self._caches.get("version", ()) != version:
            self._caches = {"version": version}
        if key not in self._caches:
            with torch.inference_mode(False):  # what is kept may be used in training later
                self._caches[key] = make()
        return self._caches[key]
