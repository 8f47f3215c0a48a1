"""Seconds of a push and of a cold load, beside plain upload and download of the same bytes.

    python -m benchmarks.hub_speed

Both go to the server of `tests/hub_server.py` on loopback, for a toy pipeline and for images with 28 MB of weights, in
interleaved runs. A push is `publish` beside `HfApi.upload_folder`; a cold load is `VSDMPipeline.from_pretrained` from
an empty cache beside `snapshot_download` and the same load from its folder. Writes
`benchmarks/results/hub_speed.json`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.hub_server import Hub

from .tables import RESULTS


REPEATS = 20
CHANNELS = 96  # of a UNet2DModel with 28 MB


def timed(function: Any) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def folders(root: Path) -> dict[str, Path]:
    """A trained toy, and an untrained network for images that is as large as small ones are."""
    from diffusers import UNet2DModel

    from diffusers_vsdm import AdaptiveDiagonalDrift, VSDMPipeline, VSDMScheduler
    from diffusers_vsdm.trainer import TrainingConfig, train
    from diffusers_vsdm.trainer.report import write_report

    toy = TrainingConfig(output_dir=str(root / "toy"), standardize=True, max_train_steps=100)
    write_report(toy, train(toy))
    scheduler = VSDMScheduler()
    scheduler.set_drift(AdaptiveDiagonalDrift((3, 32, 32), basis="dct"))
    unet = UNet2DModel(sample_size=32, block_out_channels=(CHANNELS, CHANNELS, CHANNELS, CHANNELS), norm_num_groups=8)
    VSDMPipeline(unet, scheduler).save_pretrained(root / "images")
    return {"toy": root / "toy", "images": root / "images"}


def main() -> None:
    """Start the server, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "hub").mkdir()
        server = Hub(root / "hub")
        server.start()
        os.environ |= {"HF_ENDPOINT": server.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "token-alice"}
        os.environ |= {"HF_HOME": str(root / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            runs = measure(root, server)
        finally:
            server.process.kill()
    from diffusers_vsdm.trainer.report import versions

    record = {"command": "python -m benchmarks.hub_speed", "versions": versions(), "runs": runs}
    (RESULTS / "hub_speed.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(root: Path, server: Any) -> list[dict[str, Any]]:
    """Interleaved pushes and loads, each of a repository of its own."""
    from diffusers.utils import logging
    from huggingface_hub import snapshot_download

    from diffusers_vsdm import VSDMPipeline
    from diffusers_vsdm.hub.publishing import publish, published

    logging.disable_progress_bar()
    api, runs = server.api(), []
    for kind, folder in folders(root).items():
        size = sum((folder / file).stat().st_size for file in published(folder))
        for repeat in range(REPEATS):
            ours, plain = f"alice/{kind}-{repeat}", f"alice/plain-{kind}-{repeat}"
            cache, plain_cache = root / f"{kind}-{repeat}", root / f"plain-{kind}-{repeat}"

            def push(folder: Path = folder, name: str = ours) -> None:
                publish(folder, name)

            def plain_push(folder: Path = folder, name: str = plain) -> None:
                api.create_repo(name)
                api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=published(folder))

            def load(name: str = ours, to: Path = cache) -> None:
                VSDMPipeline.from_pretrained(name, cache_dir=to)

            def plain_load(name: str = plain, to: Path = plain_cache) -> None:
                VSDMPipeline.from_pretrained(snapshot_download(name, cache_dir=to))

            # who goes first finds colder files: take turns
            order = 1 if repeat % 2 else -1
            seconds = {
                f.__name__: timed(f) for pair in ((push, plain_push), (load, plain_load)) for f in pair[::order]
            }
            metrics = {"megabytes": size / 1e6, **seconds}
            metrics |= {f"{what}_ratio": seconds[what] / seconds[f"plain_{what}"] for what in ("push", "load")}
            runs.append({"name": kind, "seed": repeat, "metrics": metrics})
            print(runs[-1], flush=True)
        for key in ("push_ratio", "load_ratio"):
            print(kind, key, statistics.median(r["metrics"][key] for r in runs if r["name"] == kind), flush=True)
    return runs


if __name__ == "__main__":
    main()
