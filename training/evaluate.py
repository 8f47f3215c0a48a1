r"""Evaluate a saved pipeline.

    python training/evaluate.py --pretrained_model_name_or_path outputs/spiral-8y --likelihood --dataset_name spiral-8y
    accelerate launch training/evaluate.py --pretrained_model_name_or_path outputs/cifar --fidelity \
        --dataset_name uoft-cs/cifar10 --runs heun@35 trig@10 --output_dir outputs/cifar-fid

`--likelihood` measures the negative log-likelihood of data under the probability flow, for images in bits per
dimension too, and an upper bound of that of the SDE, which is another model. `--fidelity` samples images, on one
process or several, and compares them with data; stopped, it goes on where it was.
"""

import json
from dataclasses import asdict
from pathlib import Path

from transformers import HfArgumentParser

from diffusers_vsdm.command_line import told
from diffusers_vsdm.files import write_atomically
from diffusers_vsdm.trainer.evaluation import EvaluationConfig, evaluate
from diffusers_vsdm.trainer.processes import process_state
from diffusers_vsdm.trainer.report import versions


def main() -> None:
    """Parse the command line, evaluate, print and save the record."""
    with told(ValueError, OSError, ImportError, FloatingPointError):
        (config,) = HfArgumentParser(EvaluationConfig, description=__doc__).parse_args_into_dataclasses()
        metrics = evaluate(config)
    if not process_state().is_main_process:
        return
    for name, value in metrics.items():
        if not name.endswith("_standard_error") and name not in ("runs", "table"):
            error = metrics.get(f"{name}_standard_error")
            print(f"{name}: {value}" if error is None else f"{name}: {value:.4f} ± {error:.4f}")
    print(metrics.get("table", ""))
    if config.output_dir:
        record = {"metrics": metrics, "config": asdict(config), "versions": versions()}
        write_atomically(Path(config.output_dir) / "metrics.json", (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
