"""Loads this repository without an import of your own: `pip install diffusers-vsdm`, then

    DiffusionPipeline.from_pretrained(repository, custom_pipeline=repository, trust_remote_code=True)
"""

from diffusers_vsdm import VSDMPipeline


__all__ = ["VSDMPipeline"]
