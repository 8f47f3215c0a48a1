"""The `pipeline.py` of a model's repository, for those who load by `custom_pipeline=..., trust_remote_code=True`."""

from pathlib import Path

from ..files import write_atomically


FILE_NAME = "pipeline.py"
CONTENT = '''"""Loads this repository without an import of your own: `pip install diffusers-vsdm`, then

    DiffusionPipeline.from_pretrained(repository, custom_pipeline=repository, trust_remote_code=True)
"""

from diffusers_vsdm import VSDMPipeline


__all__ = ["VSDMPipeline"]
'''


def write_remote_code(folder: Path) -> None:
    """Write `pipeline.py` into a model's folder."""
    write_atomically(folder / FILE_NAME, CONTENT.encode())
