"""Checkpoints: written beside their place, then renamed; the last N stay."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tarflow.common.files import write_json
from tarflow.flows.model import TARFlowModel
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
    accelerator: Accelerator, folder: Path, state: dict[str, Any], averages: WeightAverages, keep: int
) -> Path:
    """Save everything a resume needs; ``state`` (with "step") goes into run.json. Every process calls this.

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
    stages = [
        begin if main else None,
        lambda: accelerator.save_state(str(temporary)),
        lambda: averages.save(temporary / "averages"),
        end if main else None,
    ]
    for stage in stages[:1] if saved else stages:
        if error := agreed_error(accelerator, stage):
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"cannot write the checkpoint {path}: {error}")
    if main and not saved:
        temporary.rename(path)
        for old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f"{old.name}.gone")  # no checkpoint any more, should this be interrupted
            old.rename(gone)
            shutil.rmtree(gone)
    accelerator.wait_for_everyone()
    return path


def agreed_error(accelerator: Accelerator, stage: Callable[[], Any] | None) -> str:
    """Run one stage on each process; if it fails on any, all of them hear of it before they go on to the next.

    Returns:
        the reason, "" if there is none.
    """
    reason = ""
    try:
        if stage is not None:
            stage()
    except Exception as error:  # noqa: BLE001 (whatever it is, the other processes must hear of it)
        reason = " ".join(str(error).split()) or type(error).__name__
    failed = accelerator.reduce(torch.tensor(float(bool(reason)), device=accelerator.device), "sum") > 0
    return reason or ("another process failed" if failed else "")


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """Work of the main process, whose result it gets; the others get None. An error ends all processes, as those would
    wait for the main one for hours. Every process calls this.

    Raises:
        ValueError: on the others; on the main process whatever the work raises.
    """
    if accelerator.num_processes == 1:
        return work()
    result, raised = [None], []

    def stage() -> None:
        try:
            result[0] = work()
        except Exception as error:
            raised.append(error)
            raise

    error = agreed_error(accelerator, stage if accelerator.is_main_process else None)
    if raised:
        raise raised[0]
    if error:
        raise ValueError("the main process stopped; it says why")
    return result[0]


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
    path = Path(resume)
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
        return json.loads((path / "run.json").read_text(encoding="utf-8"))


def check_state(path: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Whether a run can go on from a checkpoint.

    Args:
        path, state: the checkpoint and its run.json.
        facts: what must be the same in the run: the complete arguments of its model as "flow", "ema_decays",
            "images_per_step", whether it is "sharded", under FSDP, and by names of their own those of "joint", None if
            the autoencoder is frozen, those of "lora", None if no adapter is trained; and what their numbers mean,
            "classes" and "tokens" (see `meaning`).

    Raises:
        ValueError: that names the first difference, and what to do.
    """
    facts, name = json.loads(json.dumps(facts)), str(path)
    # A setting that one of the two does not name has its default, also in checkpoints from before there was the setting.
    defaults = {key: value.default for key, value in inspect.signature(TARFlowModel).parameters.items()}
    defaults = json.loads(json.dumps(defaults))
    for key in sorted(set(facts["flow"]) | set(state["flow"])):
        there, here = (flow.get(key, defaults.get(key)) for flow in (state["flow"], facts["flow"]))
        if there != here:
            raise ValueError(
                f"the checkpoint {name!r} has another architecture: flow.{key} is {there!r} there and {here!r} here"
            )
    if state["ema_decays"] != facts["ema_decays"]:
        raise ValueError(f"the checkpoint {name!r} has the EMA decays {state['ema_decays']}, not {facts['ema_decays']}")
    if state["images_per_step"] != facts["images_per_step"]:
        raise ValueError(
            f"the checkpoint {name!r} was trained with {state['images_per_step']} pictures a step, not "
            f"{facts['images_per_step']}: set train.batch_size and train.accumulation to the same with these processes"
        )
    check_meaning(path, state, facts)
    here, there = facts.get("joint") or {}, state.get("joint") or {}
    if bool(here) != bool(there):
        ways = "joint" if there else "frozen"
        raise ValueError(f"the checkpoint {name!r} was trained with vae.train {ways!r}: set it to that")
    check_facts(path, there, {key: here.get(key) for key in sorted(set(here) | set(there))})
    here, there = facts.get("lora") or {}, state.get("lora") or {}
    if bool(here) != bool(there):
        was = f"is of an adapter of lora.rank {there['lora.rank']}" if there else "is of no adapter (lora.rank 0)"
        raise ValueError(f"the checkpoint {name!r} {was}: set lora.rank to that")
    check_facts(path, there, here)
    if state["sharded"] != facts["sharded"]:
        ways = "with FSDP" if state["sharded"] else "without FSDP"
        raise ValueError(
            f"the checkpoint {name!r} was written {ways}: resume it that way, or start from its pipeline folder "
            "with init_from"
        )


def check_meaning(path: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Whether the numbers of classes and tokens mean the same; checkpoints from before these were kept pass.

    Raises:
        ValueError: that names the first difference.
    """
    kinds = (("classes", "class", "the same class folders or names"), ("tokens", "token", "the same captions"))
    for name, what, remedy in kinds:
        there, here = state.get(name), facts.get(name)
        if name not in state or there == here:
            continue
        if not isinstance(there, list) or not isinstance(here, list):
            raise ValueError(
                f"the checkpoint {str(path)!r} was trained with other {name} than this run has: resume with {remedy}, "
                "or start anew in another output"
            )
        places = range(max(len(there), len(here)))
        place = next(place for place in places if there[place : place + 1] != here[place : place + 1])
        names = (repr(known[place]) if place < len(known) else "none" for known in (there, here))
        was, is_now = names
        raise ValueError(
            f"the checkpoint {str(path)!r} was trained with other {name}: {what} {place} is {was} there and {is_now} "
            f"here; resume with {remedy}, or start anew in another output"
        )


def check_facts(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
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
