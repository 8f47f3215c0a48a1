"""Jobs of a study, each in a fresh process of one thread."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def run_all(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """Results in the order of the jobs, on all cores.

    The processes are forked from one that has imported the package, and end with this one even if it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers_vsdm.trainer.report", "ot"])
    with context.Pool(os.cpu_count(), _start, maxtasksperchild=1) as pool:
        yield from pool.imap(function, jobs)


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
