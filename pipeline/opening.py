"""A pipeline by what a user calls it: a folder, a shipped name, a hub id."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tarflow.models import resolve, shipped
from tarflow.pipeline.loading.device import best_device
from tarflow.pipeline.loading.folder import INDEX
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(name: str) -> str:
    """The folder or hub id that a name stands for; a mistyped path is an error, and never looked for on the Hub.

    Raises:
        ValueError: if the name is none of a pipeline's folder, a shipped pipeline and ``owner/name``.
    """
    found = resolve(name)
    path = Path(found).expanduser()
    if (path / INDEX).is_file():
        return str(path)
    if (path / "pipeline" / INDEX).is_file():
        raise ValueError(f"{name!r} is the folder of a run; its pipeline is {str(path / 'pipeline')!r}")
    if path.exists():
        raise ValueError(f"{name!r} is no folder of a pipeline: it has no {INDEX}")
    # An owner that is a folder here means a path.
    if HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        return name
    known = ", ".join(shipped()) or "none"
    raise ValueError(f"there is no pipeline {name!r}: give its folder, a shipped name ({known}) or a hub id owner/name")


def open_pipeline(name: str, device: str | None = None) -> TARFlowPipeline:
    """Load a pipeline in float32, without progress bars of its own.

    Args:
        name: a folder, a shipped name or a hub id.
        device: where to draw; None takes the best that there is.

    Raises:
        ValueError: if there is no such pipeline or device, or the pipeline's files are damaged.
    """
    place = locate(name)
    device = device or best_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use the device {device!r}: {str(error).splitlines()[0]}") from error
    try:
        pipe = TARFlowPipeline.from_pretrained(place).to(device)
    except Exception as error:  # damaged files, or a hub that does not answer, raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot open the pipeline {name!r}: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
