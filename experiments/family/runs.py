"""Results of single trainings, each kept in a file of its own, so that a comparison goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow.common.files import read_json, replaced, write_json

#: Numbers for the tables, and tensors for the pictures and for other runs.
Result = tuple[dict[str, Any], dict[str, Any]]


def file_name(name: str) -> str:
    """Letters and digits of a name, other characters as single underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


class Runs:
    """A folder with NAME.json (settings and numbers) and NAME.pt (tensors) for each run.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: dict[str, Any], make: Callable[[], Result]) -> Result:
        """The result of a run: what is there if it was made with the same settings, else what ``make`` gives."""
        path, settings = self.folder / f"{name}.json", json.loads(json.dumps(settings))
        tensors = path.with_suffix(".pt")
        if path.is_file() and tensors.is_file():
            found = read_json(path)
            if found["settings"] == settings:
                return found["numbers"], torch.load(tensors)
        numbers, made = make()
        path.unlink(missing_ok=True)  # between the two files no earlier settings may stand beside these tensors
        with replaced(tensors) as temporary:
            torch.save(made, temporary)
        write_json(path, {"settings": settings, "numbers": numbers}, nan_as_null=True)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items() if isinstance(value, float))
        print(f"{name}: {shown}", flush=True)
        return numbers, made
