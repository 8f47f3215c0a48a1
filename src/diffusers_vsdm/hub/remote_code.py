"""The `pipeline.py` of a model's repository, for those who load by `custom_pipeline=..., trust_remote_code=True`."""

from pathlib import Path

from ..files import write_atomically


FILE_NAME = "pipeline.py"
CONTENT = '''"""Loads this folder without an import of your own: `pip install diffusers-vsdm`, then

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

By a name on the Hub `import diffusers_vsdm` comes first, with or without `custom_pipeline`.
"""

from diffusers_vsdm import {name}


__all__ = ["{name}"]
'''


def write_remote_code(folder: Path, name: str = "VSDMPipeline") -> None:
    """Write `pipeline.py` into the folder of a pipeline of this class."""
    write_atomically(folder / FILE_NAME, CONTENT.format(name=name).encode())
