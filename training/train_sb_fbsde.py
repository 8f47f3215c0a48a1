r"""Train networks on both sides, SB-FBSDE, from a score-based model or a VSDM on.

    accelerate launch training/train_sb_fbsde.py --dataset_name 8gaussians --standardize --beta_max 3 \
        --output_dir outputs/bridge

The model to start from is trained first and kept in `output_dir/start`, where a resumed run finds it. The output
folder holds the pipeline, `metrics.json`, `samples.png` and a model card; with `--push_to_hub` so does a repository on
the Hub.
"""

import sys
from pathlib import Path

from transformers import HfArgumentParser

from diffusers_vsdm import VSDMPipeline
from diffusers_vsdm.trainer.bridge import BridgeConfig, train_bridge
from diffusers_vsdm.trainer.bridge_report import write_bridge_report
from diffusers_vsdm.trainer.pushing import push, repository_for


def main() -> None:
    """Parse the command line, train, and report."""
    try:
        (config,) = HfArgumentParser(BridgeConfig, description=__doc__).parse_args_into_dataclasses()
        config.prepare_output_dir()
        repo_id = repository_for(config)
        folder = Path(config.output_dir) / "start"
        has_start = config.resume_from_checkpoint and (folder / "model_index.json").exists()
        result = train_bridge(config, VSDMPipeline.from_pretrained(folder) if has_start else None, folder)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_sb_fbsde.py: {error}")
    metrics = write_bridge_report(config, result)["metrics"]
    print(f"\n{metrics['start_seconds']:.0f} s for the start and {metrics['seconds']:.0f} s for the bridge", end="")
    print(f"; everything is in {config.output_dir}/")
    if repo_id is None:
        return
    try:
        print(f"It is on the Hub: {push(config, repo_id)}")
    except RuntimeError as error:
        sys.exit(f"train_sb_fbsde.py: {error}")


if __name__ == "__main__":
    main()
