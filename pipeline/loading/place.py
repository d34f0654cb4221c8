"""Where a pipeline lies by what a user calls it, and what its files say of it; nothing here takes long to import."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tarflow.models import is_hub_id, resolve, shipped

#: What makes a folder that of a pipeline.
INDEX = "model_index.json"
#: What draws if nothing else is asked for, the first that there is.
DEFAULT_SHIPPED, DEFAULT_FOLDER = "emoji", "runs/quickstart/pipeline"


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
    if is_hub_id(name):
        return name
    known = ", ".join(shipped()) or "none"
    raise ValueError(f"there is no pipeline {name!r}: give its folder, a shipped name ({known}) or a hub id owner/name")


def title_of(pipeline: str) -> str:
    """A pipeline by its folder and that of its run, or by its name."""
    folder = Path(pipeline).expanduser()
    return f"{folder.resolve().parent.name}/{folder.name}" if folder.is_dir() else pipeline


def default_pipeline() -> str:
    """The shipped pipeline of emoji, or the quick start's.

    Raises:
        ValueError: if there is neither; it says what to do.
    """
    if DEFAULT_SHIPPED in shipped():
        return DEFAULT_SHIPPED
    if (Path(DEFAULT_FOLDER) / INDEX).is_file():
        return DEFAULT_FOLDER
    raise ValueError(
        "there is no pipeline to draw with: name a folder (--pipeline runs/NAME/pipeline), or train one first "
        "(make quickstart)"
    )


@dataclass(frozen=True)
class Facts:
    """What is known of a pipeline without its weights.

    Attributes:
        conditioning: of its flow.
        num_classes: of its flow, 0 without classes.
        names: of the classes, by index.
    """

    conditioning: str
    num_classes: int
    names: dict[int, str]


def facts_of(place: str) -> Facts | None:
    """What the files of a pipeline say of it; None for a hub id, and for files that cannot be read so.

    Args:
        place: as `locate` returns it.
    """
    try:
        index = json.loads((Path(place) / INDEX).read_text(encoding="utf-8"))
        flow = json.loads((Path(place) / "flow" / "config.json").read_text(encoding="utf-8"))
        names = {int(key): str(name) for key, name in (index.get("id2label") or {}).items()}
        return Facts(str(flow["conditioning"]), int(flow.get("num_classes") or 0), names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # opening it says what is wrong
