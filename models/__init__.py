"""Pipelines that ship with the project; `TARFlowPipeline.from_pretrained` takes their names.

May import: nothing else of the project.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

#: Each shipped pipeline has a folder here, named like it.
FOLDER = Path(__file__).resolve().parent
#: Their autoencoders, by the names that `tarflow.vae.codec.load_autoencoder` takes.
AUTOENCODERS = {"drawings_emoji_f8c8": FOLDER / "drawings_text" / "vae", "taef2": FOLDER / "emoji" / "vae"}


def shipped() -> tuple[str, ...]:
    """Names of the shipped pipelines."""
    return tuple(sorted(index.parent.name for index in FOLDER.glob("*/model_index.json")))


def resolve(name: str | Path) -> str:
    """The folder of a shipped pipeline by its name; a hub id, or a folder of the user's that is a pipeline's or a run's, stays
    as it is."""
    own = any(Path(name, *inner, "model_index.json").exists() for inner in ((), ("pipeline",)))
    return str(FOLDER / name) if str(name) in shipped() and not own else str(name)


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one on the Hub, ``owner/name``; an owner that is a folder here means a path."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def locate_autoencoder(name: str) -> str:
    """The folder or hub id that an autoencoder's name stands for; a mistyped one is an error, and never looked for on the
    Hub, which is asked for half a minute.

    Raises:
        ValueError: if the name is none of a shipped autoencoder, a folder and ``owner/name``.
    """
    if name in AUTOENCODERS:
        return str(AUTOENCODERS[name])
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser())
    if is_hub_id(name):
        return name
    reason = "there is no such folder"
    if name in shipped():
        own = next(known for known, folder in AUTOENCODERS.items() if folder == followed(FOLDER / name / "vae"))
        reason = f"this is a shipped pipeline, whose autoencoder is {own}"
    raise ValueError(
        f"cannot load the autoencoder {name!r} (shipped: {', '.join(AUTOENCODERS)}; else a folder or hub id owner/name): "
        f"{reason}"
    )


#: In the folder of an autoencoder instead of its weights: which of `AUTOENCODERS` it is.
SHARED = "shared.json"


def followed(folder: str | Path) -> Path:
    """The folder of an autoencoder that has its weights: that of another shipped pipeline if this one names it, so that
    no weights are shipped twice.

    Raises:
        ValueError: if there is no such autoencoder.
    """
    file = Path(folder) / SHARED
    if not file.is_file():
        return Path(folder)
    name = json.loads(file.read_text(encoding="utf-8"))["autoencoder"]
    if name not in AUTOENCODERS:
        raise ValueError(
            f"{str(file)!r} names the autoencoder {name!r}; shipped are {', '.join(AUTOENCODERS)}: install the version of "
            "the package that the pipeline is of"
        )
    return AUTOENCODERS[name]
