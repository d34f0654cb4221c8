"""Checkpoints: written beside their place, then renamed; the last N stay."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tarflow.training.averages import WeightAverages

NAME = re.compile(r"^step_(\d+)$")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if NAME.match(path.name) and (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: dict[str, Any], averages: WeightAverages, keep: int
) -> Path:
    """Save everything a resume needs; ``state`` (with "step") goes into run.json. Every process calls this.

    Raises:
        OSError: on all processes if one cannot write, for example on a full disk; no half-written checkpoint stays.
    """
    path = folder / f"step_{state['step']:08d}"
    temporary = folder / f"{path.name}.tmp"
    error = None
    try:
        if accelerator.is_main_process:
            remove(temporary)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        averages.save(temporary / "averages")
        if accelerator.is_main_process:
            (temporary / "run.json").write_text(json.dumps(state, indent=1))
    except Exception as caught:  # noqa: BLE001 (whatever it is, the other processes must hear of it)
        error = caught
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), "sum") > 0
    if failed:
        if accelerator.is_main_process:
            remove(temporary)
        reason = "another process could not write" if error is None else " ".join(str(error).split())
        raise OSError(f"cannot write the checkpoint {path}: {reason}") from error
    if accelerator.is_main_process:
        remove(path)
        temporary.rename(path)
        for old in checkpoints(folder)[:-keep]:
            remove(old)
    accelerator.wait_for_everyone()
    return path


def remove(folder: Path) -> None:
    """Delete a folder that, should this be interrupted, is no checkpoint any more."""
    if folder.exists():
        gone = folder.with_name(f"{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` names: "latest", "auto" (the latest, None if there is none), or a folder.

    Raises:
        ValueError: if there is none.
    """
    if resume in ("latest", "auto"):
        found = checkpoints(folder)
        if not found:
            if resume == "auto":
                return None
            raise ValueError(f"there is no checkpoint in {str(folder)!r} to resume from; start without --resume")
        return found[-1]
    path = Path(resume)
    if not (path / "run.json").is_file():
        raise ValueError(f"{resume!r} is no checkpoint folder: it has no run.json")
    return path


def read_state(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint."""
    return json.loads((path / "run.json").read_text())


def check_state(path: Path, state: dict[str, Any], flow: dict[str, Any], decays: list[float], sharded: bool) -> None:
    """Whether a run can go on from a checkpoint.

    Args:
        flow: the complete arguments of the run's model.
        decays: of its averaged weights.
        sharded: whether it runs under FSDP.

    Raises:
        ValueError: if it belongs to a model of another architecture, and the like; names the first difference.
    """
    flow = json.loads(json.dumps(flow))
    for key in sorted(set(flow) | set(state["flow"])):
        if flow.get(key) != state["flow"].get(key):
            raise ValueError(
                f"the checkpoint {str(path)!r} has another architecture: flow.{key} is {state['flow'].get(key)!r} "
                f"there and {flow.get(key)!r} here"
            )
    if state["ema_decays"] != decays:
        raise ValueError(f"the checkpoint {str(path)!r} has the EMA decays {state['ema_decays']}, not {decays}")
    if state["sharded"] != sharded:
        ways = "with FSDP" if state["sharded"] else "without FSDP"
        raise ValueError(
            f"the checkpoint {str(path)!r} was written {ways}: resume it that way, or start from its pipeline folder "
            "with init_from"
        )
