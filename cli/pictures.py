"""Where pictures are written: one file, or a folder with a file for each."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

#: Formats by a file name's end, and the largest side that each can hold.
FORMATS = {".png": ("PNG", 2**31 - 1), ".jpg": ("JPEG", 65500), ".jpeg": ("JPEG", 65500), ".webp": ("WEBP", 16383)}


class Target:
    """A place for pictures that can be written to; its folder is made.

    Args:
        out: the file, or the folder: an existing one, or a name that ends with a slash.

    Raises:
        ValueError: for a file of an unknown format, or a place that cannot be written to.
    """

    def __init__(self, out: str):
        self.path = Path(out).expanduser()
        self.is_folder = self.path.is_dir() or out.endswith(("/", os.sep))
        self.suffix = ".png" if self.is_folder else self.path.suffix.lower()
        if self.suffix not in FORMATS:
            raise ValueError(
                f"--out {out!r} must end with {', '.join(FORMATS)}, or with / for a folder with a file for each picture"
            )
        folder = self.path if self.is_folder else self.path.parent
        probe = folder / f".{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}") from error

    def check_size(self, width: int, height: int) -> None:
        """Whether the format holds a picture of this size."""
        name, largest = FORMATS[self.suffix]
        if max(width, height) > largest:
            raise ValueError(
                f"the grid of {width} × {height} pixels is too large for {name}, which holds {largest} on a side: "
                "take .png, or a folder"
            )

    def save(self, image: Image.Image, name: str = "") -> None:
        """Write a picture under a temporary name and rename it, so that it is whole or not there.

        Args:
            image: the picture.
            name: of its file in a folder, without the end.

        Raises:
            OSError: if that fails; nothing half-written stays.
        """
        path = self.path / f"{name}{self.suffix}" if self.is_folder else self.path
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        kind, _ = FORMATS[self.suffix]
        try:
            image.save(temporary, format=kind, **({} if kind == "PNG" else {"quality": 95}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def file_stems(subjects: list[str]) -> list[str]:
    """The beginnings of file names for captions or classes, all different: their letters and digits, with dashes."""
    stems = []
    for subject in subjects:
        stem = re.sub(r"[\W_]+", "-", subject.lower()).strip("-")[:60].strip("-") or "image"
        stems.append(stem if stem not in stems else f"{stem}-{len(stems) + 1}")
    return stems
