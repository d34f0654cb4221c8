"""Pictures in one ``.npz`` file, read piece by piece: such files are larger than memory for tens of thousands."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np


@contextmanager
def open_array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The file of ``arr_0`` inside an ``.npz``, at its first number, and its shape (N, H, W, 3).

    Raises:
        ValueError: if it is no ``.npz``, has no ``arr_0``, or that is not uint8 of this layout.
    """
    name = str(path)
    if not path.is_file():
        raise ValueError(f"there is no file {name!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{name!r} is no .npz archive, or it is cut off")
    with zipfile.ZipFile(path) as archive:
        members = [member.removesuffix(".npy") for member in archive.namelist()]
        if "arr_0" not in members:
            what = "statistics of an extractor that it does not name" if "mu" in members else f"only {members}"
            raise ValueError(f"{name!r} holds {what}; expected an array arr_0 of pictures, uint8 (N, H, W, 3)")
        with archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = header(file)
            if dtype != np.uint8:
                raise ValueError(f"arr_0 of {name!r} has the type {dtype}, expected uint8 from 0 to 255")
            if len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
                raise ValueError(f"arr_0 of {name!r} has the shape {shape}, expected (N, H, W, 3), N varying slowest")
            yield file, shape


def read_whole(file: IO[bytes], count: int, path: Path, start: int | None = None) -> bytes:
    """So many bytes of an archive's member, from ``start`` or where it stands; fewer are a ValueError that names it."""
    try:
        if start is not None:
            file.seek(start)  # reads what is compressed
        content = file.read(count)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    if len(content) != count:
        raise ValueError(f"{str(path)!r} is cut off: {len(content)} of {count} bytes of a batch are there")
    return content
