"""What the training scripts have in common: settings from flags, one line for an error, the push at the end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from .data.images import DamagedImageError
from .trainer.config import RunConfig
from .trainer.processes import process_state
from .trainer.pushing import push, repository_for


Config = TypeVar("Config", bound=RunConfig)


@contextmanager
def told(*errors: type[Exception]) -> Iterator[None]:
    """Exit with the script's name and the message in place of a traceback."""
    try:
        yield
    except errors as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def parse(config_class: type[Config], description: str | None) -> tuple[Config, str | None]:
    """The settings, and the repository to push to, if any; the output folder is there then.

    Raises:
        ValueError: A setting is wrong.
        OSError: The folder or the Hub refuses.
    """
    (config,) = HfArgumentParser(config_class, description=description).parse_args_into_dataclasses()
    repo_id = None
    if process_state().is_main_process:
        config.prepare_output_dir()
        repo_id = repository_for(config)
    return config, repo_id


def finish(config: RunConfig, repo_id: str | None, summary: str) -> None:
    """Say where everything is, and push it if asked to."""
    print(f"\n{summary}; everything is in {config.output_dir}/")
    if repo_id is not None:
        with told(RuntimeError):
            print(f"It is on the Hub: {push(config, repo_id)}")


def train(
    config_class: type[Config],
    trainer_class: Callable[[Config], Any],
    report: Callable[[Any, Any], dict[str, Any]],
    description: str | None,
) -> None:
    """A training script: parse the command line, train, and report on the main process.

    Args:
        config_class: Its settings.
        trainer_class: A [`BaseTrainer`] of them.
        report: From the trainer and its result to the record, which it also writes.
        description: For `--help`.
    """
    with told(ValueError, OSError, ImportError):
        config, repo_id = parse(config_class, description)
        trainer = trainer_class(config)
    with told(DamagedImageError, FloatingPointError, OSError):
        result = trainer.train()
    process_state().destroy_process_group()
    if process_state().is_main_process:
        share = report(trainer, result)["metrics"]["sa_share"]
        summary = f"{result.seconds:.0f} s of training, {100 * share:.1f}% of it in stochastic approximation"
        finish(trainer.config, repo_id, summary)
