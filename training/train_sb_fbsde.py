r"""Train networks on both sides, SB-FBSDE, from a score-based model or a VSDM on.

    accelerate launch training/train_sb_fbsde.py --dataset_name 8gaussians --standardize --beta_max 3 \
        --output_dir outputs/bridge

The model to start from is trained first and kept in `output_dir/start`, where a resumed run finds it. The output
folder holds the pipeline, `metrics.json`, `samples.png` and a model card; with `--push_to_hub` so does a repository on
the Hub.
"""

from pathlib import Path

from diffusers_vsdm.command_line import finish, parse, told
from diffusers_vsdm.trainer.bridge import BridgeConfig, train_bridge
from diffusers_vsdm.trainer.bridge_report import write_bridge_report
from diffusers_vsdm.trainer.processes import process_state


def main() -> None:
    """Parse the command line, train, and report."""
    with told(ValueError, OSError, ImportError, FloatingPointError):
        config, repo_id = parse(BridgeConfig, __doc__)
        result = train_bridge(config, start_folder=Path(config.output_dir) / "start")
    process_state().destroy_process_group()
    if process_state().is_main_process:
        with told(FloatingPointError):
            metrics = write_bridge_report(result)["metrics"]
        seconds = f"{metrics['start_seconds']:.0f} s for the start and {metrics['seconds']:.0f} s for the bridge"
        finish(config, repo_id, seconds)


if __name__ == "__main__":
    main()
