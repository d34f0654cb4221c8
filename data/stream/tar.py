"""Rows of a tar file in the layout of WebDataset: files of one name before the first dot are one row.

``a/0001.jpg``, ``a/0001.txt`` and ``a/0001.json`` are the row ``a/0001``. Its columns are ``__key__``, ``__folder__`` (the
key's last folder, "a"), one of each file by its ending (pictures as bytes; ``txt`` and ``text`` as texts, ``cls`` as a
number or text), and those of the object in ``json`` that have none of these names.
"""

from __future__ import annotations

import gzip
import json
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

from tarflow.data.formats import PICTURE_SUFFIXES, is_of_system
from tarflow.data.stream.urls import UnreachableError, opened, reason_of, without_query

KEY, FOLDER = "__key__", "__folder__"
#: Why a row cannot be used, if one of its files cannot be read.
BROKEN = "__broken__"
TEXTS = ("txt", "text", "caption")
#: How a tar file is compressed, by its ending; fsspec's names.
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


def tar_rows(url: str) -> Iterator[dict[str, Any]]:
    """The rows of a tar file in its order; none is held longer than it takes. One of which a file is not what its ending
    says has the reason in `BROKEN`.

    Raises:
        ValueError: that names the file, if it cannot be read to its end; `UnreachableError` if it may be later.
    """
    key, row, endings = "", dict[str, Any](), set[str]()
    for name, content in tar_files(url):
        stem, ending = key_of(name)
        if stem != key and row:
            yield row
            row = {}
        if not row:
            key, row = stem, {KEY: stem, FOLDER: posixpath.basename(posixpath.dirname(stem))}
            endings = set()
        if content is None:
            row[BROKEN] = (
                f"the file {name!r} is a link without content: pack it with tar --dereference --hard-dereference"
            )
            continue
        try:
            found = columns_of_file(ending, content)
        except ValueError as error:
            row[BROKEN] = f"the file {name!r} cannot be read: {error}"
            continue
        if ending in endings:
            row[BROKEN] = f"it has two files of the ending {ending!r}, the second {name!r}"
        endings.add(ending)
        row = {**found, **row} if ending == "json" else {**row, **found}
    if row:
        yield row


def key_of(name: str) -> tuple[str, str]:
    """The key and the ending of a file's name: "a/0001" and "seg.png" of "a/0001.seg.png"."""
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def columns_of_file(ending: str, content: bytes) -> dict[str, Any]:
    """What a file adds to its row.

    Raises:
        ValueError: if it is not what its ending says.
    """
    if ending in TEXTS:
        return {ending: content.decode("utf-8-sig").strip()}
    if ending == "cls":
        text = content.decode("utf-8-sig").strip()
        return {ending: int(text) if text.lstrip("-").isdigit() else text}
    if ending == "json":
        found = json.loads(content)
        return found if isinstance(found, dict) else {ending: found}
    return {ending: content}


def is_picture(ending: str) -> bool:
    """Whether a column of a tar's row is a picture, by its ending."""
    return f".{ending.rpartition('.')[2]}" in PICTURE_SUFFIXES


def tar_files(url: str) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of a tar file's files, in one pass from its beginning, without content of links; other endings
    than a row uses are passed over.

    Raises:
        ValueError: that names it, if it is no tar file, cut off, or followed by another one.
    """
    with opened(url, COMPRESSIONS.get(posixpath.splitext(without_query(url))[1])) as file:
        watched = Watched(file)
        try:
            with tarfile.open(fileobj=watched, mode="r|") as archive:  # type: ignore[call-overload]  # it reads alone
                for member in archive:
                    ending = key_of(member.name)[1]
                    known = is_picture(ending) or ending in (*TEXTS, "cls", "json")
                    is_file = member.isreg() or member.issym() or member.islnk()
                    if is_file and known and not is_of_system(posixpath.basename(member.name)):
                        content = archive.extractfile(member) if member.isreg() else None
                        yield member.name, None if content is None else content.read()
                    archive.members = []  # which would grow with the file
                more = watched.ended and any(any(part) for part in iter(partial(watched.read, 2**16), b""))
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
            raise ValueError(f"the shard {url!r} is cut off or damaged: {reason_of(error)}") from error
        except Exception as error:  # file systems have errors of their own
            raise UnreachableError(f"the shard {url!r} cannot be read on: {reason_of(error)}") from error
        if more:
            raise ValueError(
                f"the shard {url!r} has more behind its end, as tar files joined by cat: name them one by one"
            )
        if not watched.ended:
            raise ValueError(f"the shard {url!r} is cut off: it lacks the mark of a tar file's end")


class Watched:
    """A file that remembers whether what was last read ended in zeros, as a tar file does."""

    def __init__(self, file: IO[bytes]):
        self.file, self.ended = file, False

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if content:
            self.ended = not any(content[-512:])
        return content
