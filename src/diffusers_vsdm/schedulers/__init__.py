"""Schedulers that plug into Diffusers."""

from .scheduling_vsdm import VSDMScheduler, VSDMSchedulerOutput


__all__ = ["VSDMScheduler", "VSDMSchedulerOutput"]
