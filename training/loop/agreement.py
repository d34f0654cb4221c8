"""Processes that do something together hear of each other's errors, instead of waiting for hours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator, PartialState

from tarflow.common.command import sentence
from tarflow.common.processes import gather_objects

Result = TypeVar("Result")


def outcome(
    state: PartialState | Accelerator, stage: Callable[[], Result] | None
) -> tuple[Result | None, Exception | None, str]:
    """Run a stage on each process, or on those that have one; every process calls this.

    Returns:
        the stage's result, its error, and the first reason of all processes' errors, "" if there is none.
    """
    result, failure = None, None
    try:
        if stage is not None:
            result = stage()
    except Exception as error:  # noqa: BLE001 (whatever it is, the other processes must hear of it)
        failure = error
    reason = "" if failure is None else sentence(failure) or type(failure).__name__
    reasons = gather_objects(reason) if state.num_processes > 1 else [reason]
    return result, failure, reason or next((other for other in reasons if other), "")


def agreed(state: PartialState | Accelerator, stage: Callable[[], Result]) -> Result:
    """Run a stage on each process; if it fails on one, the others stop too. Every process calls this.

    Raises:
        ValueError: of another process. What this one's stage raises is raised as it is.
    """
    if state.num_processes == 1:
        return stage()
    result, failure, reason = outcome(state, stage)
    if failure is not None:
        raise failure
    if reason:
        raise ValueError(reason)
    return result  # type: ignore[return-value]  # the stage's own, as it has not failed


def main_alone(state: PartialState | Accelerator, work: Callable[[], Result]) -> Result | None:
    """Work of the main process, whose result it gets; the others get None. An error ends all processes. Every process
    calls this.

    Raises:
        ValueError: on the others; on the main process whatever the work raises.
    """
    if state.num_processes == 1:
        return work()
    result, failure, reason = outcome(state, work if state.is_main_process else None)
    if failure is not None:
        raise failure
    if reason:
        raise ValueError("the main process stopped; it says why")
    return result
