"""Generated pictures against what they were to show: the conditions in their folder, and the checker of drawings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tarflow.common.files import read_json_lines
from tarflow.common.processes import gather_objects, process_and_count
from tarflow.common.words import counted
from tarflow.data.drawing_checker import class_shares, match_shares
from tarflow.evaluation.images.sets import ImageSet

CONDITIONS = "conditions.jsonl"


def read_conditions(images: ImageSet, folder: str | Path) -> tuple[str, list[Any]]:
    """What each picture was drawn from, in the pictures' order.

    Args:
        images: generated pictures.
        folder: that ``tarflow evaluate fid gen`` wrote.

    Returns:
        "caption" or "label", and the captions or class indices.

    Raises:
        ValueError: if the folder has no such file, or it lacks some of the pictures.
    """
    path = Path(folder).expanduser() / CONDITIONS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {CONDITIONS}, so it is not known what its pictures were to show")
    rows: dict[int, dict[str, Any]] = {}
    for number, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("index"), int):
            raise ValueError(f"line {number} of {str(path)!r} is no JSON object with an index")
        rows[row["index"]] = row
    indices = images.indices()
    if absent := [index for index in indices if index not in rows]:
        raise ValueError(f"{str(path)!r} has no line for {counted(len(absent), 'picture')}, first {absent[0]}")
    for kind in ("caption", "label"):
        if all(kind in rows[index] for index in indices):
            return kind, [rows[index][kind] for index in indices]
    raise ValueError(f"{str(path)!r} has neither a caption nor a label for every picture")


def matching_shares(images: ImageSet, kind: str, values: list[Any], batch_size: int = 256) -> dict[str, float]:
    """Shares of drawings that are what their caption (shape, colour, background) or class (shape, colour) says.

    Args:
        images: the drawings.
        kind: "caption" or "label".
        values: captions, or class labels of the drawings by index or name, in the pictures' order.
        batch_size: pictures that are read at once.

    Returns:
        "match_shape", "match_colour", for captions "match_background", and "match_all".

    Raises:
        ValueError: for captions or labels that are not of drawings.
    """
    process, processes = process_and_count()
    hits: list[tuple[int, dict[str, float]]] = []
    for number, batch in enumerate(images.batches(batch_size, process, processes)):
        first = (process + number * processes) * batch_size
        pictures = list(batch.permute(0, 2, 3, 1).numpy())  # (H, W, 3) each
        wanted = values[first : first + len(batch)]
        shares = match_shares(pictures, wanted) if kind == "caption" else class_shares(pictures, wanted)
        hits.append((len(batch), shares))
    parts = [part for gathered in gather_objects(hits) for part in gathered]
    return {
        f"match_{name}": math.fsum(count * shares[name] for count, shares in parts) / len(images)
        for name in parts[0][1]
    }
