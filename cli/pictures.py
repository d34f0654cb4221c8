"""Where pictures are written: one file, or a folder with a file for each."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow.common.files import check_writable, write_picture

if TYPE_CHECKING:
    from PIL import Image

#: Formats by a file name's end, and the largest side that each can hold.
FORMATS = {".png": ("PNG", 2**31 - 1), ".jpg": ("JPEG", 65500), ".jpeg": ("JPEG", 65500), ".webp": ("WEBP", 16383)}


#: Letters of a caption in a file's name.
LONGEST_STEM = 60


class Target:
    """A place for pictures that can be written to; a folder that is missing comes with the first one.

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
        check_writable(out, self.is_folder)

    def check_size(self, width: int, height: int) -> None:
        """Whether the format holds a picture of this size."""
        name, largest = FORMATS[self.suffix]
        if max(width, height) > largest:
            raise ValueError(
                f"the grid of {width} × {height} pixels is too large for {name}, which holds {largest} on a side: "
                "take .png, or a folder"
            )

    def save(self, image: Image.Image, name: str = "") -> None:
        """Write a picture, whole or not at all.

        Args:
            image: the picture.
            name: of its file in a folder, without the end.

        Raises:
            OSError: if that fails; nothing half-written stays.
        """
        path = self.path / f"{name}{self.suffix}" if self.is_folder else self.path
        kind, _ = FORMATS[self.suffix]
        write_picture(path, image, kind, **({} if kind == "PNG" else {"quality": 95}))


def file_stems(subjects: list[str]) -> list[str]:
    """The beginnings of file names for captions or classes, all different: their letters and digits, with dashes."""
    stems: list[str] = []
    for subject in subjects:
        stem = shortened(re.sub(r"[\W_]+", "-", subject.lower()).strip("-")).strip("-") or "image"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(len(stems) + 1)))
        stems.append(next(name for name in names if name not in stems))
    return stems


def shortened(text: str) -> str:
    """The first letters of a text, as many as a file's name holds: file systems count bytes."""
    return text[:LONGEST_STEM].encode()[: 3 * LONGEST_STEM].decode(errors="ignore")
