"""Latent normalizing flows for images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow.flows.model import TARFlowModel
    from tarflow.flows.trajectory.model import TrajectoryFlowModel
    from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
    from tarflow.vae.codec import LatentCodec

__all__ = ["LatentCodec", "TARFlowModel", "TARFlowPipeline", "TrajectoryFlowModel"]

_MODULES = {
    "LatentCodec": "tarflow.vae.codec",
    "TARFlowModel": "tarflow.flows.model",
    "TARFlowPipeline": "tarflow.pipeline.pipeline_tarflow",
    "TrajectoryFlowModel": "tarflow.flows.trajectory.model",
}


def __getattr__(name: str) -> Any:
    """Import a class at its first use: the libraries behind it take seconds, for which `tarflow --help` need not wait."""
    if name not in _MODULES:
        raise AttributeError(f"module 'tarflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
