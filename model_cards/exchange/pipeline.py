"""Loads this folder without an import of your own: `pip install diffusers-vsdm`, then

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

By a name on the Hub `import diffusers_vsdm` comes first, with or without `custom_pipeline`.
"""

from diffusers_vsdm import VSDMForecastPipeline


__all__ = ["VSDMForecastPipeline"]
