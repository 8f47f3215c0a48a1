"""Pipelines that load and sample as any Diffusers pipeline does."""

from .pipeline_bridge import BridgePipeline
from .pipeline_forecast import VSDMForecastOutput, VSDMForecastPipeline
from .pipeline_vsdm import VSDMPipeline, VSDMPipelineOutput


__all__ = ["BridgePipeline", "VSDMForecastOutput", "VSDMForecastPipeline", "VSDMPipeline", "VSDMPipelineOutput"]
