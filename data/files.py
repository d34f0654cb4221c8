"""Reading files of a folder or of a zip archive by the same names."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Iterable
from errno import ELOOP, ENOENT, ENOTDIR
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from tarflow.data.formats import OTHER_SUFFIXES, PICTURE_SUFFIXES, is_of_system, readable_suffixes, suffix
from tarflow.data.place import status_of

#: The last record of a zip archive with the longest comment.
END_BYTES = 22 + 65_535


class Files:
    """The files below a folder, or inside a zip archive, named by their paths with forward slashes.

    What systems leave beside pictures is not among them (see `is_of_system`). Links are followed, but none that leads
    back to a folder above it.

    Raises:
        ValueError: if the path does not exist, is neither a folder nor a zip archive, or cannot be read whole; if a
            folder has a link that leads nowhere (see `list_folder`); if an archive is encrypted, holds links, or names
            outside of itself or twice.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self._members: dict[str, str] = {}  # names within an archive, as the archive writes them
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        found = status_of(path)
        if stat.S_ISDIR(found.st_mode):
            # By folders, which is another order than that of the whole names; no name has a \0.
            self.names = sorted(list_folder(self.path), key=lambda name: name.replace("/", "\0"))
        elif zipfile.is_zipfile(self.path):
            self._members = list_archive(self.path)
            self.names = sorted(self._members)
        else:
            raise ValueError(f"the data path {path!r} is neither a folder nor a zip archive")

    def images(self) -> list[str]:
        """The pictures that can be read here."""
        return list(self._pictures[0])

    def unreadable_images(self) -> list[str]:
        """Pictures of formats that could be read with a plug-in of Pillow that is not installed."""
        return list(self._pictures[1])

    def other_images(self) -> list[str]:
        """Drawings, raw camera files and the like, which are never read."""
        return list(self._pictures[2])

    @cached_property
    def _pictures(self) -> tuple[list[str], list[str], list[str]]:
        """Names of readable, unreadable and other pictures, sorted out once, as there may be millions."""
        readable = readable_suffixes()
        kinds: tuple[list[str], list[str], list[str]] = [], [], []
        kind_of = {end: kinds[2] for end in OTHER_SUFFIXES}
        kind_of |= {end: kinds[0 if end in readable else 1] for end in PICTURE_SUFFIXES}
        for name in self.names:
            kind = kind_of.get(suffix(name))
            if kind is not None:
                kind.append(name)
        return kinds

    def place(self, name: str) -> str:
        """Path and name for messages; bytes that are no text are written as numbers."""
        return shown(f"{self.path}/{name}")

    def facts(self, name: str) -> tuple[int, int, int]:
        """Size, checksum of the content (0 in folders, where it would have to be read) and time in ns (0 in archives).

        All are −1 of a file that is not there.
        """
        if self._members:
            member = self._open_archive().getinfo(self._members[name])
            return member.file_size, member.CRC, 0
        try:
            found = (self.path / name).stat()
        except OSError:
            return -1, -1, -1
        return found.st_size, 0, found.st_mtime_ns

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        """One file, opened for reading; each process opens the archive for itself."""
        return self._open_archive().open(self._members[name]) if self._members else (self.path / name).open("rb")

    def _open_archive(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_archive": None}
        state.pop("_pictures", None)
        return state


def shown(name: str) -> str:
    """A file's name for messages: what is no text in it as numbers, so that it can be printed everywhere."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_folder(top: Path) -> list[str]:
    """Names of all files below a folder, in any order.

    Raises:
        ValueError: that names a folder which cannot be read, or a link that leads nowhere: it may have been a class. A
            link with a picture's name is there, as reading it names it.
    """
    names: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        folder = top / prefix
        try:
            about = folder.stat()
            here = (about.st_dev, about.st_ino)
            if here in above:
                continue  # a link to a folder above: its pictures are there already
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_of_system(entry.name):
                        continue
                    if entry.is_symlink() and leads_nowhere(entry):
                        if suffix(entry.name) not in PICTURE_SUFFIXES:
                            raise ValueError(
                                f"the link {shown(f'{top}/{prefix}{entry.name}')!r} leads nowhere: mend or remove it"
                            )
                        names.append(prefix + entry.name)
                    elif entry.is_dir():
                        waiting.append((f"{prefix}{entry.name}/", above | {here}))
                    elif entry.is_symlink() or entry.is_file():
                        names.append(prefix + entry.name)
        except OSError as error:
            raise ValueError(
                f"the folder {shown(str(folder))!r} cannot be read ({error.strerror}): allow it, or move it elsewhere"
            ) from error
    return names


def leads_nowhere(link: os.DirEntry[str]) -> bool:
    """Whether a link's target is not there, or is the link itself."""
    try:
        link.stat()
    except OSError as error:
        if error.errno not in (ENOENT, ENOTDIR, ELOOP):
            raise
        return True
    return False


def list_archive(path: Path) -> dict[str, str]:
    """Names of all files in a zip archive, and how the archive writes them.

    Raises:
        ValueError: if it is damaged or encrypted, holds links, or names outside of itself or of two files.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"the archive {str(path)!r} cannot be read: {error}") from error
    for info in infos:
        written = decoded_name(info).replace("\\", "/")  # as some programs on Windows write it
        if written.endswith("/"):
            continue
        name = posixpath.normpath(written)
        if name.startswith(("/", "../")) or re.match("[A-Za-z]:", name):
            raise ValueError(f"the archive {str(path)!r} has a name outside of itself, {info.filename!r}: pack it anew")
        if any(is_of_system(part) for part in name.split("/")):
            continue
        if info.flag_bits & 1:
            raise ValueError(f"the archive {str(path)!r} is encrypted: unpack it, or pack it without a password")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"the archive {str(path)!r} holds links, {info.filename!r}: pack the files themselves")
        other = members.get(name)
        if other is not None and (other.CRC, other.file_size) != (info.CRC, info.file_size):
            raise ValueError(f"the archive {str(path)!r} has two different files of the name {name!r}: pack it anew")
        members[name] = info
    return {name: info.filename for name, info in members.items()}


def decoded_name(info: zipfile.ZipInfo) -> str:
    """A file's name in an archive. Some programs write UTF-8 without saying so, which zipfile then takes for code page 437."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def archive_length(path: Path) -> int:
    """How many files a zip archive has, or 65,535 if more, as its last record says, without listing them."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        end = file.read()
    found = end.rfind(b"PK\5\6")
    return int.from_bytes(end[found + 10 : found + 12], "little")


def hash_of(values: Iterable[Any]) -> str:
    """SHA-256 of some values, in order."""
    digest = sha256()
    for value in values:
        digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()
