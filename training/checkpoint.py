"""Checkpoints: written beside their place, then renamed; the last N stay."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

NAME = re.compile(r"^step_(\d+)$")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if NAME.match(path.name) and (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Save everything a resume needs; ``state`` (with "step") goes into run.json.

    Raises:
        OSError: if the disk is full; no half-written checkpoint stays behind.
    """
    path = folder / f"step_{state['step']:08d}"
    temporary = folder / f"{path.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            (temporary / "run.json").write_text(json.dumps(state, indent=1))
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def find_checkpoint(folder: Path, resume: str) -> Path:
    """The checkpoint that ``--resume`` names: "latest", or a folder.

    Raises:
        ValueError: if there is none.
    """
    if resume == "latest":
        found = checkpoints(folder)
        if not found:
            raise ValueError(f"there is no checkpoint in {str(folder)!r} to resume from; start without --resume")
        return found[-1]
    path = Path(resume)
    if not (path / "run.json").is_file():
        raise ValueError(f"{resume!r} is no checkpoint folder: it has no run.json")
    return path


def read_state(path: Path, flow: dict[str, Any]) -> dict[str, Any]:
    """run.json of a checkpoint.

    Raises:
        ValueError: if it belongs to a model of another architecture; the message names the first difference.
    """
    state = json.loads((path / "run.json").read_text())
    flow = json.loads(json.dumps(flow))
    for key in sorted(set(flow) | set(state["flow"])):
        if flow.get(key) != state["flow"].get(key):
            raise ValueError(
                f"the checkpoint {str(path)!r} has another architecture: flow.{key} is {state['flow'].get(key)!r} "
                f"there and {flow.get(key)!r} here"
            )
    return state
