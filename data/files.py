"""Reading files of a folder or of a zip archive by the same names."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Files:
    """The files below a folder, or inside a zip archive, named by their paths with forward slashes.

    Raises:
        ValueError: if the path does not exist, or is neither a folder nor a zip archive.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise ValueError(f"the data path {path!r} does not exist; give a folder of images or a zip archive of one")
        if self.path.is_dir():
            files = sorted(file for file in self.path.rglob("*") if file.is_file())
            self.names = [file.relative_to(self.path).as_posix() for file in files]
        elif zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as archive:
                self.names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        else:
            raise ValueError(f"the data path {path!r} is neither a folder nor a zip archive")
        self._archive: tuple[int, zipfile.ZipFile] | None = None

    def images(self) -> list[str]:
        return [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)]

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        """One file, opened for reading; each process opens the archive for itself."""
        if self.path.is_dir():
            return (self.path / name).open("rb")
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1].open(name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archive": None}
