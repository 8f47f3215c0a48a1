"""Pushing what a training script leaves, as its settings say."""

from pathlib import Path

from ..hub.publishing import create_repository, publish
from .config import RunConfig


def repository_for(config: RunConfig) -> str | None:
    """Make sure, before the work, that the model can be pushed; returns the repository, or None without a push.

    Raises:
        HfHubHTTPError: The Hub refuses; its message says why.
        ConnectionError: The Hub is not to be reached.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return create_repository(name, config.hub_private_repo or None, config.hub_revision or None)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of a client whose package is not the same in all versions
        raise ConnectionError(
            f"The Hub is not to be reached ({error}): leave out `push_to_hub`, push later."
        ) from error


def push(config: RunConfig, repo_id: str) -> str:
    """Push the model in `config.output_dir`; returns the commit's address.

    Raises:
        RuntimeError: It could not be pushed; the message says how to do so later.
    """
    folder = Path(config.output_dir)
    try:
        return publish(folder, repo_id, revision=config.hub_revision or None, tag=config.hub_tag or None)
    except Exception as error:
        raise RuntimeError(
            f"the model could not be pushed ({error}). It is whole in {folder}; push it with"
            f" `diffusers_vsdm.hub.publishing.publish({str(folder)!r}, {repo_id!r})`."
        ) from error
