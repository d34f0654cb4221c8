"""Checkpoints: written beside their place, then renamed; the last N stay."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tarflow.common.files import write_json
from tarflow.training.loop.agreement import outcome
from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.reading import reading

NAME = re.compile(r"^step_(\d+)$")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if NAME.match(path.name) and (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    state: dict[str, Any],
    averages: WeightAverages,
    keep: int,
    write_own: Callable[[Path], None],
) -> Path:
    """Save everything a resume needs; ``state`` (with "step") goes into run.json, and ``write_own`` writes what each process
    has of its own. Every process calls this.

    Raises:
        OSError: on all processes if one cannot write, for example on a full disk; no half-written checkpoint stays.
    """
    path = folder / checkpoint_name(state["step"])
    temporary, saved = folder / f"{path.name}.tmp", path in checkpoints(folder)

    def begin() -> None:
        for left in [*folder.glob("step_*.tmp"), *folder.glob("step_*.gone")]:  # of runs that were killed
            shutil.rmtree(left)
        if not saved:
            temporary.mkdir(parents=True)

    def end() -> None:
        write_json(temporary / "run.json", state, indent=1)

    main = accelerator.is_main_process
    stages: list[Callable[[], object] | None] = [
        begin if main else None,
        lambda: accelerator.save_state(str(temporary)),
        lambda: averages.save(temporary / "averages"),
        partial(write_own, temporary),
        end if main else None,
    ]
    for stage in stages[:1] if saved else stages:
        _, failure, reason = outcome(accelerator, stage)
        if reason:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            reason = "another process failed" if failure is None else reason
            raise OSError(f"cannot write the checkpoint {path}: {reason}") from failure
    if main and not saved:
        temporary.rename(path)
        for old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f"{old.name}.gone")  # no checkpoint any more, should this be interrupted
            old.rename(gone)
            shutil.rmtree(gone)
    accelerator.wait_for_everyone()
    return path


def checkpoint_to_resume(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint of a run's folder to go on from, None for a new run.

    Raises:
        ValueError: if there is none, or the run would be mixed with an earlier one.
    """
    path = None if resume is None else find_checkpoint(folder / "checkpoints", resume)
    found = checkpoints(folder / "checkpoints")
    if found and (path is None or path.resolve().parent != found[-1].resolve().parent):
        raise ValueError(
            f"{str(folder)!r} has checkpoints of an earlier run, up to {found[-1].name}: go on with --resume latest, "
            "give another output, or remove them"
        )
    return path


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
    path = Path(resume).expanduser()
    if not (path / "run.json").is_file():
        raise ValueError(f"{resume!r} is no checkpoint folder: it has no run.json")
    found = checkpoints(folder)
    if path.resolve().parent == folder.resolve() and found and found[-1].name > path.name:
        raise ValueError(
            f"this run has checkpoints newer than {path.name}, up to {found[-1].name}: remove them, or go on from "
            f"{path.name} with another output"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint.

    Raises:
        ValueError: that names it, if it cannot be read.
    """
    with reading(path / "run.json"):
        state: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return state


def check_invariants(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Whether a run can go on from a checkpoint.

    Args:
        path: of the checkpoint.
        there, here: what must be the same, by readable names, in the checkpoint and in the run.

    Raises:
        ValueError: that names the first difference.
    """
    for name, value in here.items():
        if there.get(name) != value:
            raise ValueError(
                f"the checkpoint {str(path)!r} differs: {name} is {there.get(name)} there and {value} here"
            )
