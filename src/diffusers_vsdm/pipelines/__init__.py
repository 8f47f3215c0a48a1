"""Pipelines that load and sample as any Diffusers pipeline does."""

from .pipeline_vsdm import VSDMPipeline, VSDMPipelineOutput


__all__ = ["VSDMPipeline", "VSDMPipelineOutput"]
