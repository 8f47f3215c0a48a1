"""Pushing a trained model's folder to the Hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from .cards import render_card


# what a model is; checkpoints, logs and whatever else lies beside it stays where it is
FILES = ("README.md", "model_index.json", "pipeline.py", "metrics.json", "samples.png", "forecast.png", "drift.png")
FOLDERS = ("unet", "forward_unet", "model", "scheduler", "normalizer")


def create_repository(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make sure that a model repository, and a branch of it, is there; returns its whole name, `user/name`.

    Args:
        repo_id (`str`): `name`, for the user that the token is of, or `user/name`.
        private (`bool`, *optional*): For a new repository; an old one stays as it is.
        revision (`str`, *optional*): A branch.
        token (`str`, *optional*): Of a user who may write there. Defaults to the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        HfHubHTTPError: The Hub refuses; its message says why.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str = "A variational Schrödinger diffusion model",
    token: str | None = None,
) -> str:
    """Push a folder that a training script left, in one commit: it is on the Hub whole or not at all.

    The card is rendered anew with the repository's name, and what was written into it by hand, here or on the Hub,
    is kept; of two such texts this folder's counts. Files of the repository that the folder does not have stay there.

    Args:
        folder: The model's folder.
        repo_id, private, revision, token: See [`create_repository`].
        tag (`str`, *optional*): A tag for the commit; it must be new.
        commit_message (`str`): Of the commit.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: The folder holds no pipeline.
        HfHubHTTPError: The Hub refuses; what was pushed before a failure is not visible, and can be pushed again.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"`folder` {folder} holds no pipeline: there is no model_index.json in it.")
    repo_id = create_repository(repo_id, private, revision, token)
    api = HfApi(token=token)
    metrics = folder / "metrics.json"
    if metrics.is_file():
        try:
            published_card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text()
        except RemoteEntryNotFoundError:
            published_card = None
        render_card(folder, json.loads(metrics.read_text()), repo_id, published_card)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        allow_patterns=published(folder),
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def published(folder: Path) -> list[str]:
    """The files of a model's folder that go to the Hub, relative to it."""
    files = [folder / name for name in FILES]
    files += [file for name in FOLDERS for file in (folder / name).rglob("*") if not file.name.startswith(".")]
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
