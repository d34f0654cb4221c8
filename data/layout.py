"""What the folders of a data set mean: wrapping folders, splits, classes.

1. A single folder that holds folders alone, and is not named as a split, only wraps the data: what is in it counts.
2. Then, if all top folders are named as splits (``train`` or ``training``; ``val``, ``valid``, ``validation``, ``dev``,
   ``test``, ``testing``, ``eval`` or ``evaluation``; capitals are as good as small letters), they are the splits.
   Within them the first rule holds again.
3. Then folders are classes, whatever folders are in them; or all pictures lie side by side, without classes.

Folders with names of splits beside others are ambiguous and refused, unless ``split_folders`` says what is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"),
}


class Placed(NamedTuple):
    """Where a picture belongs.

    Attributes:
        name: of its file.
        split: "train" or "validation", as its folder says; None if there are no split folders.
        folder: its class folder; None if it lies in none.
        deeper: whether it lies in a further folder within the class folder.
    """

    name: str
    split: str | None
    folder: str | None
    deeper: bool


def split_of(folder: str) -> str | None:
    """The split that a folder's name says."""
    return next((split for split, names in SPLIT_FOLDERS.items() if folder.lower() in names), None)


def place_pictures(names: Sequence[str], path: str, split_folders: str = "auto") -> list[Placed]:
    """Split and class folder of each picture; by "only" those outside of split folders are left out.

    Args:
        names: of the picture files.
        path: of the data, for messages.
        split_folders: as `DataConfig` has it.

    Raises:
        ValueError: if some top folders are named as splits and others are not, or none is and some must be.
    """
    above = {name: name.rpartition("/")[0] for name in names}
    # Few folders have all the names, of which there may be millions.
    folders = {folder: folder.split("/") if folder else [] for folder in dict.fromkeys(above.values())}
    depth = wrapping_depth(list(folders.values()), 0, split_folders != "none")
    tops = {folder: (parts[depth] if len(parts) > depth else "") for folder, parts in folders.items()}
    splits = {top: None if split_folders == "none" else split_of(top) for top in set(tops.values())}
    named = sorted(top for top, split in splits.items() if split)
    others = sorted(top for top, split in splits.items() if not split)
    if split_folders == "only" and not named:
        raise ValueError(f"data.split_folders is 'only', but {path!r} has no folder train, val or the like")
    if named and others and split_folders == "auto":
        beside = ", ".join(top for top in others if top) or "pictures outside of folders"
        raise ValueError(
            f"{path!r} has folders named as splits ({', '.join(named)}) beside others ({beside}): set "
            "data.split_folders to 'none' if all are classes, or to 'only' to leave the others out"
        )
    kept = {folder: parts for folder, parts in folders.items() if not named or splits[tops[folder]]}
    if named:
        depth = wrapping_depth(list(kept.values()), depth + 1, False)
    places = {folder: place_of(splits[tops[folder]], parts, depth) for folder, parts in kept.items()}
    return [Placed(name, *places[above[name]]) for name in names if above[name] in places]


def place_of(split: str | None, folders: list[str], depth: int) -> tuple[str | None, str | None, bool]:
    """Split, class folder and whether there is a deeper one, by the folders above, of which the first ``depth`` are no
    classes."""
    return split, folders[depth] if len(folders) > depth else None, len(folders) > depth + 1


def wrapping_depth(folders: list[list[str]], depth: int, splits: bool) -> int:
    """How deep the data begins, below single folders that hold folders alone.

    Args:
        folders: above each picture, from the top.
        depth: where to begin.
        splits: whether a folder named as a split is one.
    """
    while folders and all(len(parts) > depth + 1 for parts in folders):
        tops = {parts[depth] for parts in folders}
        if len(tops) > 1 or (splits and split_of(next(iter(tops)))):
            break
        depth += 1
    return depth
