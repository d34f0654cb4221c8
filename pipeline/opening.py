"""A pipeline by what a user calls it: a folder, a shipped name, a hub id."""

from __future__ import annotations

import torch

from tarflow.pipeline.loading.device import best_device
from tarflow.pipeline.loading.place import locate
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline


def open_pipeline(name: str, device: str | None = None) -> TARFlowPipeline:
    """Load a pipeline in float32, without progress bars of its own.

    Args:
        name: a folder, a shipped name or a hub id.
        device: where to draw; None takes the best that there is.

    Raises:
        ValueError: if there is no such pipeline or device, or the pipeline's files are damaged.
    """
    locate(name)  # before the device is touched
    device = device or best_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use the device {device!r}: {str(error).splitlines()[0]}") from error
    pipe = load_pipeline(name).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(name: str, dtype: torch.dtype | None = None) -> TARFlowPipeline:
    """Load a pipeline on the CPU.

    Args:
        name: a folder, a shipped name or a hub id.
        dtype: of its parts; None takes float32.

    Raises:
        ValueError: if there is no such pipeline, or its files are damaged.
    """
    place = locate(name)
    try:
        return TARFlowPipeline.from_pretrained(place, **({} if dtype is None else {"torch_dtype": dtype}))
    except Exception as error:  # damaged files, or a hub that does not answer, raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot open the pipeline {name!r}: {reason}") from error
