"""What a run says of itself: what it trains on, how much of it, how long, where it writes, and how to use the result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence, Sized
from pathlib import Path

from tarflow.common.words import count_in_words, duration_in_words, rounded
from tarflow.data.drawings import ENDLESS
from tarflow.data.folder import ImageFolder
from tarflow.data.stream.stream import Stream
from tarflow.training.loop.schedule import TIMED_STEPS

#: Runs that take fewer seconds do not say how long they take.
SHORT = 120.0


def number_of_pictures(data: Sized) -> int:
    """How many different pictures a data set has; there may be an item for each caption of a picture."""
    source = getattr(data, "source", None)
    if isinstance(source, ImageFolder):
        return len({row.name for row in source.rows})
    return len(data) // int(getattr(source, "variants", 1))


def pictures_in_words(data: Sized, held_out: Sized | None) -> str:
    """What is trained on, and how much is held out."""
    if isinstance(data, Stream):
        count = 0 if held_out is None else len(held_out)
        shards, said = sum(len(one.names) for one in data.shards), held_out_in_words(count)
        return f"a stream of {shards:,} shards, {said}"
    if len(data) >= ENDLESS:
        return "drawings, each made for its place in a batch"
    count = 0 if held_out is None else number_of_pictures(held_out)
    return f"{number_of_pictures(data):,} pictures, {held_out_in_words(count)}"


def held_out_in_words(count: int) -> str:
    """How many pictures are held out."""
    if not count:
        return "none is held out"
    return "1 other is held out" if count == 1 else f"{count:,} others are held out"


def beginning(
    pictures: str,
    items: int,
    parameters: int,
    steps: int,
    batch: int,
    folder: Path,
    first: int = 0,
    minutes: float | None = None,
) -> list[str]:
    """Sentences, a line each.

    Args:
        pictures: what is trained on, see `pictures_in_words`.
        items: of the training data.
        parameters: numbers that are trained.
        steps: of the whole run.
        batch: pictures of a step.
        folder: of the run.
        first: steps that are done already.
        minutes: after which the run ends, if the steps take longer.
    """
    length = f"{steps:,} steps of {batch:,} pictures"
    if minutes is not None:
        length = f"at most {length}, and about {minutes:g} minutes"
    elif items < ENDLESS:
        times = steps * batch / items
        length += f", each is seen about {times:,.0f} times" if times >= 1.5 else ", most are seen once at most"
    going_on = f", from step {first:,} on" if first else ""
    return [
        f"training on {pictures}; {count_in_words(parameters)} parameters learn",
        f"{length}{going_on}; all is written to {folder}",
    ]


def drawing_line(
    pipeline: str | Path,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    options: Sequence[str] = (),
) -> str:
    """The command that draws from a pipeline, as a shell takes it.

    Args:
        pipeline: its folder or name.
        prompts: captions that it was shown, if it draws from captions.
        classes: names of its classes, if it draws classes.
        options: further words.
    """
    words = ["tarflow", "generate"]
    if prompts:
        words.append(prompts[0])
    elif classes:
        words += ["--class", classes[0]]
    return shlex.join([*words, "--pipeline", str(pipeline), *options, "--out", "drawing.png"])


class TimeEstimate:
    """Says once how long a run still takes.

    Args:
        option: what ends it earlier, for example "--train.max_minutes".
    """

    def __init__(self, option: str):
        self.option, self.begun = option, 0.0

    def after(self, done: int, left: int, seconds: float) -> str | None:
        """A sentence after `TIMED_STEPS`, if the run is not short.

        Args:
            done: steps since the run began.
            left: steps to come.
            seconds: that steps took so far, without evaluations and the like.
        """
        if done == TIMED_STEPS[0]:
            self.begun = seconds
        if done != TIMED_STEPS[1]:
            return None
        step = (seconds - self.begun) / (TIMED_STEPS[1] - TIMED_STEPS[0])
        if step * left < SHORT:
            return None
        return (
            f"about {duration_in_words(step * left)} to go, at {rounded(step)} s a step, evaluations not counted; "
            f"{self.option} ends it earlier"
        )
