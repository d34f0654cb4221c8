"""Seconds of what is compared, measured in turns, so that other work on the machine falls on all alike."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from tarflow.common.clock import clock
from tarflow.common.files import write_json
from tarflow.experiments.peers.drawing import Drawer
from tarflow.experiments.peers.runs import Trainings

#: Pictures that are timed together; steps that are.
TIMED_PICTURES, TIMED_STEPS = 8, 5
#: How many steps each training takes, where seconds decide that.
FITTING = "steps.json"


def picture_seconds(drawers: Mapping[str, Drawer], values: list[Any], repeats: int) -> dict[str, float]:
    """Median seconds a picture, the autoencoder included, of `TIMED_PICTURES` at once; all take turns, after one each."""
    some = values[:TIMED_PICTURES]
    return in_turns({key: partial(drawer.draw, some, 0) for key, drawer in drawers.items()}, repeats, len(some))


def fitting_steps(trainings: Trainings, name: str, seconds: float, repeats: int) -> int:
    """How many steps of a training take so many seconds of the processor, with reading left out.

    The first training that is asked for is timed alone; each other in turns with it, and gets as many steps as take its
    time. They are noted in `FITTING`, so that a training that goes on has the same number.
    """
    path = trainings.folder / FITTING
    known: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in known:
        first = next(iter(known), name)
        spent = step_seconds(trainings, list(dict.fromkeys([first, name])), repeats, time.process_time)
        fitting = seconds / spent[name] if first == name else known[first] * spent[first] / spent[name]
        known[name] = max(1, round(fitting))
        write_json(path, known)
    return known[name]


def step_seconds(
    trainings: Trainings, names: list[str], repeats: int, seconds: Callable[[], float] | None = None
) -> dict[str, float]:
    """Median seconds of a training step without reading, all trainings in turns of `TIMED_STEPS`, after one each.

    Args:
        trainings: of the comparison.
        names: of those that are timed.
        repeats: turns that count.
        seconds: a clock; by default that of the wall.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        turns: dict[str, Callable[[], Any]] = {}
        for name in names:
            trainer = trainings.trainer(name, f"{folder}/{name}")
            batches = cycle(islice(stack.enter_context(trainer.batches()), 1))

            def turn(trainer: Any = trainer, batches: Any = batches) -> None:
                for _ in range(TIMED_STEPS):
                    trainer.train_step(batches)

            turns[name] = turn
        return in_turns(turns, repeats, TIMED_STEPS, seconds)


def in_turns(
    turns: Mapping[str, Callable[[], Any]], repeats: int, parts: int, seconds: Callable[[], float] | None = None
) -> dict[str, float]:
    """Median seconds of each, over ``parts``; the first turn of each does not count."""
    seconds = seconds or partial(clock, torch.device("cpu"))
    spent: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats + 1):
        for name, turn in turns.items():
            began = seconds()
            turn()
            if repeat:
                spent[name].append((seconds() - began) / parts)
    return {name: statistics.median(times) for name, times in spent.items()}
