"""Generated images on disk: PNG files in sharded folders, or one ``.npz`` in ADM's form."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from tarflow.common.files import replaced, write_picture

#: Images in a folder: file systems are slow with many more.
FOLDER_SIZE = 1000
WRITERS = min(8, os.cpu_count() or 1)


class PngStore:
    """Image i is ``OUT/00012/00012345.png``: each is whole or not there.

    Attributes:
        images: where they are.
    """

    def __init__(self, out: Path):
        self.out = self.images = out

    def path(self, index: int) -> Path:
        return self.out / f"{index // FOLDER_SIZE:05d}" / f"{index:08d}.png"

    def has(self, indices: range) -> bool:
        """Whether all of a chunk are there. A machine that lost power may leave empty files, which do not count."""
        return all(is_filled(self.path(index)) for index in indices)

    def write(self, indices: range, images: np.ndarray) -> None:
        """Write uint8 images (B, H, W, 3).

        Raises:
            OSError: if one cannot be written.
        """
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(self._write_one, indices, images))

    def _write_one(self, index: int, image: np.ndarray) -> None:
        write_picture(self.path(index), Image.fromarray(image))

    def finish(self, chunks: list[range], labels: Iterator[list[int]] | None) -> None:
        """Nothing is left to do."""


class NpzStore:
    """One part per chunk, ``OUT/parts/00000064.npy``, joined at the end to ``OUT/samples.npz``.

    Attributes:
        images: where they will be.
    """

    def __init__(self, out: Path):
        self.parts, self.images = out / "parts", out / "samples.npz"

    def path(self, indices: range) -> Path:
        return self.parts / f"{indices[0]:08d}.npy"

    def has(self, indices: range) -> bool:
        """Whether a chunk is there, by itself or joined with all others."""
        return self.images.exists() or is_filled(self.path(indices))

    def write(self, indices: range, images: np.ndarray) -> None:
        """Write uint8 images (B, H, W, 3).

        Raises:
            OSError: if they cannot be written.
        """
        with replaced(self.path(indices)) as temporary, temporary.open("wb") as file:
            np.save(file, images)

    def finish(self, chunks: list[range], labels: Iterator[list[int]] | None) -> None:
        """Join all parts, one after the other in memory, and remove them.

        Args:
            chunks: all of them, in order.
            labels: of each chunk, for ``arr_1``; None without classes.
        """
        if not self.images.exists():
            num = chunks[-1].stop
            with (
                replaced(self.images) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            ):
                first = np.load(self.path(chunks[0]), mmap_mode="r")
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    write_header(file, "|u1", (num, *first.shape[1:]))
                    for chunk in chunks:
                        file.write(np.load(self.path(chunk)).tobytes())
                if labels is not None:
                    with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                        write_header(file, "<i8", (num,))
                        for part in labels:
                            file.write(np.asarray(part, dtype="<i8").tobytes())
        for chunk in chunks:
            self.path(chunk).unlink(missing_ok=True)
        with suppress(OSError):  # it is not there any more, or other files are in it
            self.parts.rmdir()


def is_filled(path: Path) -> bool:
    """Whether a file is there and not empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def write_header(file: IO[bytes], kind: str, shape: tuple[int, ...]) -> None:
    """The head of a ``.npy`` file in version 1.0, which ADM's evaluator reads."""
    header: dict[str, Any] = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
