"""Pipelines that ship with the project; `TARFlowPipeline.from_pretrained` takes their names.

May import: nothing else of the project.
"""

from __future__ import annotations

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
