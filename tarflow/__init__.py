"""Latent normalizing flows for images."""

from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.vae.codec import LatentCodec

__all__ = ["LatentCodec", "TARFlowModel", "TARFlowPipeline"]
