"""Pipelines that ship with the project; `TARFlowPipeline.from_pretrained` takes their names.

May import: nothing else of the project.
"""

from __future__ import annotations

import json
from pathlib import Path

#: Each shipped pipeline has a folder here, named like it.
FOLDER = Path(__file__).resolve().parent
#: Their autoencoders, by the names that `tarflow.vae.codec.load_autoencoder` takes.
AUTOENCODERS = {"drawings_emoji_f8c8": FOLDER / "drawings_text" / "vae", "emoji_f8c8": FOLDER / "emoji" / "vae"}


def shipped() -> tuple[str, ...]:
    """Names of the shipped pipelines."""
    return tuple(sorted(index.parent.name for index in FOLDER.glob("*/model_index.json")))


def resolve(name: str | Path) -> str:
    """The folder of a shipped pipeline by its name; a folder of the user's, or a hub id, stays as it is."""
    return str(FOLDER / name) if str(name) in shipped() and not Path(name).exists() else str(name)


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
