"""What an earlier run has left in the folder that a new one writes to."""

from __future__ import annotations

import itertools
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from tarflow.pipeline.loading.place import INDEX
from tarflow.training.flow.config import RunConfig

#: What is in the folder of a pipeline, and in that of an adapter.
MARKS = {"pipeline": INDEX, "lora": LORA_WEIGHT_NAME_SAFE}


def check_start(config: RunConfig, folder: Path) -> None:
    """Whether the pipeline that training starts from stays where it is.

    Raises:
        ValueError: if `set_aside` would move it, so that the run could not be resumed.
    """
    if config.init_from is None or config.lora.rank:
        return
    start = Path(config.init_from).expanduser().resolve()
    if start.is_dir() and folder.resolve() in start.parents:
        raise ValueError(
            f"init_from is {config.init_from!r}, in the folder of this run, {str(folder)!r}, whose earlier pipelines are put "
            "aside when training begins: give another output"
        )


def set_aside(folder: Path, kind: str) -> Path | None:
    """Move the pipelines or adapters of an earlier run, its settings, grids and logs, into a new folder beside them.

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
    for path in (*made, folder / "config.yaml", folder / "samples", folder / "logs"):
        if path.exists():
            path.rename(aside / path.name)
    return aside
