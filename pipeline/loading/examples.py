"""Captions that a pipeline's folder has as examples of what it draws."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DiffusionPipeline

from tarflow.common.files import write_json
from tarflow.pipeline.loading.place import INDEX

#: A list of texts, in the pipeline's folder.
EXAMPLES = "examples.json"


def folder_of(pipe: DiffusionPipeline) -> Path | None:
    """The folder that a pipeline was loaded from, if there is one."""
    path = Path(pipe.config.get("_name_or_path") or "")
    return path if (path / INDEX).is_file() else None


def example_captions(pipe: DiffusionPipeline) -> list[str]:
    """The captions of a pipeline's `EXAMPLES`; none without such a file, or one that cannot be read."""
    folder = folder_of(pipe)
    try:
        found = json.loads((folder / EXAMPLES).read_text(encoding="utf-8")) if folder else []
    except (OSError, ValueError):
        return []
    listed = found if isinstance(found, list) else []
    return [caption for caption in listed if isinstance(caption, str) and caption.strip()]


def write_examples(folder: Path, captions: list[str]) -> None:
    """Write `EXAMPLES` into a pipeline's folder, each caption once; what somebody wrote there stays."""
    if captions and not (folder / EXAMPLES).exists():
        write_json(folder / EXAMPLES, list(dict.fromkeys(captions)))
