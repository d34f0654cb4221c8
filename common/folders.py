"""Folders on this machine and at URLs that fsspec knows (``s3://``, ``gs://``, ``hf://``, ``memory://`` …), by the same names."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tarflow.common.files import check_writable, replaced

#: Packages that fsspec needs for a scheme beyond its own.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}


def scheme_of(path: str | Path) -> str | None:
    """The scheme of a URL, such as "s3"; None for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(path))
    return found[1].lower() if found else None


def local_path(path: str | Path) -> Path | None:
    """A path, or the path that a ``file://`` URL names; None for other URLs. A ``~`` at its beginning is the user's home."""
    scheme = scheme_of(path)
    if scheme is None:
        return Path(path).expanduser()
    return Path(str(path)[len("file://") :]).expanduser() if scheme == "file" else None


def check_url(url: str) -> None:
    """Refuse a URL of a scheme that cannot be opened here; nothing is asked of its place.

    Raises:
        ValueError: that names it, with the package that is missing.
    """
    scheme = scheme_of(url)
    if scheme in (None, "file"):
        return
    from fsspec import available_protocols, get_filesystem_class

    package = PACKAGES.get(scheme or "")
    try:
        if scheme not in available_protocols():
            raise ValueError(f"fsspec knows no scheme {scheme!r}: take one such as s3://, gs://, hf:// or file://")
        get_filesystem_class(scheme)
    except ImportError as error:
        what = f"the package {package}, which is not installed: pip install {package}" if package else str(error)
        raise ValueError(f"the URL {url!r} needs {what}") from error
    except ValueError as error:
        raise ValueError(f"cannot open the URL {url!r}: {error}") from error


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there.

    Raises:
        ValueError: see `check_url`; also if the file system refuses what it is given.
    """
    check_url(url)
    from fsspec import url_to_fs

    try:
        return url_to_fs(url)
    except Exception as error:  # whatever a file system does when it is made
        raise ValueError(f"cannot open the URL {url!r}: {' '.join(str(error).split())}") from error


class LocalFolder:
    """A folder on this machine: its files by name, each written whole or not at all.

    Attributes:
        name: as the user gave it.
        local: its path; None of a folder at a URL.
    """

    def __init__(self, path: str | Path):
        self.name = str(path)
        self.local: Path = local_path(path) or Path(path)

    def place(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return str(self.local / name)

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it is not there. Of a file that cannot be read, an `OSError`."""
        path = self.local / name
        return path.read_bytes() if path.is_file() else None

    def open(self, name: str) -> IO[bytes]:
        """A file, for reading parts of it."""
        return (self.local / name).open("rb")

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.local / name).stat().st_size

    def names(self) -> list[str]:
        """Of all files and folders in it; none if it is not there."""
        return os.listdir(self.local) if self.local.is_dir() else []

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path for what becomes the file when the context ends without an error."""
        with replaced(self.local / name) as temporary:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())

    def put_folder(self, source: Path, name: str) -> None:
        """A local folder with its files, as a folder in this one."""
        temporary = self.local / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            shutil.copytree(source, temporary)
            temporary.rename(self.local / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Take away a file, or a folder with what is in it; it need not be there."""
        path = self.local / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local path."""
        shutil.copyfile(self.local / name, target)


class UrlFolder:
    """A folder at a URL, with what `LocalFolder` has. A file is sent under a temporary name and then moved.

    Raises:
        ValueError: if it cannot be opened, see `open_url`.
    """

    local = None

    def __init__(self, url: str):
        self.name = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._open()

    def _open(self) -> tuple[Any, str]:
        """The file system and the path there; each process opens its own, as threads do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *open_url(self.name))
        return self._opened[1], self._opened[2].rstrip("/")

    def place(self, name: str) -> str:
        return f"{self.name}/{name}"

    def read(self, name: str) -> bytes | None:
        system, root = self._open()
        with self._errors(name):
            try:
                return bytes(system.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                return None
        return None

    def open(self, name: str) -> IO[bytes]:
        system, root = self._open()
        with self._errors(name):
            return system.open(f"{root}/{name}", "rb")

    def size(self, name: str) -> int:
        system, root = self._open()
        with self._errors(name):
            return int(system.size(f"{root}/{name}"))

    def names(self) -> list[str]:
        return list(self.sizes())

    def sizes(self) -> dict[str, int | None]:
        """Bytes of all files in it by name; None of folders, and where the file system does not tell."""
        system, root = self._open()
        with self._errors(""):
            try:
                found = system.ls(root, detail=True, refresh=True)
            except FileNotFoundError:
                return {}
            files = {str(entry["name"]).rstrip("/").split("/")[-1]: entry for entry in found}
            return {name: entry["size"] if entry["type"] == "file" else None for name, entry in files.items()}

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="tarflow-") as folder:
            temporary = Path(folder) / name
            yield temporary
            self._send(temporary, name)

    def _send(self, source: Path, name: str) -> None:
        system, root = self._open()
        folder, _, last = f"{root}/{name}".rpartition("/")
        sent = f"{folder}/.{last}.{secrets.token_hex(4)}.tmp"
        with self._errors(name):
            system.makedirs(folder, exist_ok=True)
            try:
                system.put_file(str(source), sent)
                system.mv(sent, f"{folder}/{last}")
            except BaseException:
                with suppress(Exception):
                    system.rm(sent)
                raise

    def put_folder(self, source: Path, name: str) -> None:
        # What tells that it is whole comes last.
        for file in sorted(source.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
            self._send(file, f"{name}/{file.name}")

    def remove(self, name: str) -> None:
        system, root = self._open()
        with self._errors(name), suppress(FileNotFoundError):
            system.rm(f"{root}/{name}", recursive=True)

    def fetch(self, name: str, target: Path) -> None:
        system, root = self._open()
        with self._errors(name):
            system.get_file(f"{root}/{name}", str(target))

    def fetch_folder(self, name: str, target: Path) -> None:
        """Copy a folder's files, which has no folders in it."""
        system, root = self._open()
        with self._errors(name):
            target.mkdir(parents=True, exist_ok=True)
            for file in system.ls(f"{root}/{name}", detail=False):
                system.get_file(file, str(target / str(file).rstrip("/").split("/")[-1]))

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Whatever a file system raises is an `OSError` that names the file."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(2, "No such file", self.place(name)) from error
        except Exception as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise OSError(5, reason, self.place(name)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


Folder = LocalFolder | UrlFolder


def open_folder(path: str | Path) -> Folder:
    """The folder of a path or URL.

    Raises:
        ValueError: if its scheme cannot be opened here.
    """
    local = local_path(path)
    return LocalFolder(local if scheme_of(path) else path) if local is not None else UrlFolder(str(path))


def check_folder_writable(path: str) -> None:
    """Refuse a folder that cannot be written to; of URLs, whose places are asked when they are opened, the scheme alone.

    Raises:
        ValueError: that names it.
    """
    local = local_path(path)
    if local is None:
        check_url(path)
    else:
        check_writable(local if scheme_of(path) else path, folder=True)


def hash_of_file(file: IO[bytes]) -> str:
    """SHA-256 of an open file's content."""
    return checksums_of_file(file, hashlib.sha256)[0]


def checksums_of_file(file: IO[bytes], *kinds: Callable[[], Any]) -> list[str]:
    """Checksums of some kinds, such as `hashlib.sha256`, of an open file's content, which is read once."""
    digests = [kind() for kind in kinds]
    while part := file.read(2**22):
        for digest in digests:
            digest.update(part)
    return [digest.hexdigest() for digest in digests]
