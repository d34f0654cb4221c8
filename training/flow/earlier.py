"""What an earlier run has left in the folder that a new one writes to."""

from __future__ import annotations

import itertools
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from tarflow.pipeline.loading.place import INDEX

#: What is in the folder of a pipeline, and in that of an adapter.
MARKS = {"pipeline": INDEX, "lora": LORA_WEIGHT_NAME_SAFE}


def set_aside(folder: Path, kind: str) -> Path | None:
    """Move the pipelines or adapters of an earlier run, and its settings, into a new folder beside them.

    Args:
        folder: of the run.
        kind: "pipeline" or "lora", as the names of what it saves begin.

    Returns:
        the new folder, ``earlier_1`` or with the next number; None if there is nothing.
    """
    made = [file.parent for file in sorted(folder.glob(f"{kind}*/{MARKS[kind]}"))]
    if not made:
        return None
    aside = next(path for number in itertools.count(1) if not (path := folder / f"earlier_{number}").exists())
    aside.mkdir()
    for path in (*made, folder / "config.yaml"):
        if path.exists():
            path.rename(aside / path.name)
    return aside
