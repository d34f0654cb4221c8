"""Where the numbers of a run are logged: Accelerate's trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from tarflow.common.checks import check


def start_trackers(accelerator: Accelerator, folder: Path, resolved: str) -> None:
    """Start the trackers, each with what it takes: TensorBoard writes into ``logs`` of the run's folder; all others get the
    settings, and the project that ``WANDB_PROJECT`` names, or "tarflow".

    Args:
        accelerator: of the run.
        folder: of the run; Weights & Biases calls the run so.
        resolved: the YAML of all settings.
    """
    wanted, started = accelerator.log_with, []
    project = os.environ.get("WANDB_PROJECT", "tarflow")
    for tracker in wanted:
        accelerator.log_with = [tracker]
        if str(tracker) == "tensorboard":
            accelerator.init_trackers("logs")
        else:
            accelerator.init_trackers(project, flat(yaml.safe_load(resolved)), {"wandb": {"name": folder.name}})
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = wanted, started


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, int | float | str]:
    """Settings of sections as one level, ``train.steps``; what is no number or text is written as one."""
    found: dict[str, int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value if isinstance(value, (int, float, str)) else json.dumps(value, default=str)
    return found


def check_trackers(names: list[str], key: str) -> None:
    """Whether trackers are known and installed; Accelerate leaves those out that are not, without a word.

    Args:
        names: of trackers.
        key: of the setting that names them.

    Raises:
        ValueError: that names the first one that is not.
    """
    known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
    available = [str(kind) for kind in get_available_trackers()]
    for name in names:
        check(
            name == "all" or name in known,
            f"{key} has {name!r}, which is no tracker of Accelerate: it knows {', '.join(known)}",
        )
        check(
            name == "all" or name in available,
            f"{key} has {name!r}, which is not installed: install it, or leave it out; installed are "
            f"{', '.join(available) or 'none'}",
        )
