"""What a run leaves for those who use its pipeline: the line that draws from it, and means of held-out pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tarflow.common.files import write_json
from tarflow.pipeline.loading.folder import HELD_OUT


def drawing_line(
    pipeline: str | Path,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> str:
    """The command that draws from a pipeline, as a shell takes it.

    Args:
        pipeline: its folder or name.
        prompts: captions that it was shown, if it draws from captions.
        classes: names of its classes, if it draws classes.
        adapter: a LoRA adapter's folder for it.
    """
    words = ["tarflow", "generate"]
    if prompts:
        words.append(prompts[0])
    elif classes:
        words += ["--class", classes[0]]
    words += ["--pipeline", str(pipeline)]
    if adapter is not None:
        words += ["--lora", str(adapter)]
    return shlex.join([*words, "--out", "drawing.png"])


def ending(what: str, place: str | Path, line: str) -> str:
    """What a run says at its end: where the result is, and how to draw from it."""
    return f"the {what} is {place}; to draw from it:\n  {line}"


def write_held_out(folder: Path, metrics: Mapping[str, float], images: int) -> None:
    """Write means of held-out pictures into a pipeline's folder; nothing without any."""
    if metrics and images:
        write_json(folder / HELD_OUT, {"images": images, **{name: float(value) for name, value in metrics.items()}})
