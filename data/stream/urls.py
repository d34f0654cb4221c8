"""Shards by path or URL: listed by patterns, and opened to be read from the beginning to the end."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from tarflow.common.folders import local_path, open_url, scheme_of

#: ``{00000..00099}`` counts; ``{a,b}`` lists.
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

#: Packages that fsspec needs for kinds of compression beyond Python's own.
PACKAGES = {"zstd": "zstandard"}
#: Errors that stay when something is tried again.
FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError, ImportError)
#: Schemes of web addresses, and answers that stay: not known who asks, not allowed, gone.
WEB, FORBIDDEN = ("http", "https"), (401, 403, 410)


class UnreachableError(ValueError):
    """What may work when it is tried again: a connection that broke, a server that is busy."""


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: ``{08..11}`` counts with as many digits, ``{a,b}`` lists.

    Raises:
        ValueError: if a range counts backwards.
    """
    parts: list[list[str]] = []
    end = 0
    for match in BRACES.finditer(pattern):
        first, last, listed = match.groups()
        if listed is None and int(first) > int(last):
            raise ValueError(
                f"the range {match.group()} in {pattern!r} counts backwards: write the smaller number first"
            )
        width = len(first or "") if (first or "").startswith("0") or len(first or "") == len(last or "") else 0
        numbers = listed is None and [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        parts += [[pattern[end : match.start()]], numbers or listed.split(",")]
        end = match.end()
    return ["".join(found) for found in itertools.product(*parts, [pattern[end:]])]


def listed(pattern: str) -> list[str]:
    """URLs of the files of a pattern with braces, stars or question marks, in the pattern's order; those with a star in
    that of their names. A question mark in a web address begins its query.

    Raises:
        ValueError: if the scheme cannot be read, a star finds nothing, or a file is named twice.
    """
    found, places = list[str](), list[str]()
    for url in expanded(os.path.expanduser(pattern)):
        fs, path = open_url(url)
        if not any(sign in without_query(path) for sign in "*?["):
            found.append(url)
            places.append(path)
            continue
        try:
            names = sorted(fs.glob(path))
        except Exception as error:
            raise ValueError(f"cannot list {url!r}: {reason_of(error)}") from error
        if not names:
            raise ValueError(f"no file fits {url!r}")
        found += [fs.unstrip_protocol(name) if scheme_of(url) else name for name in names]
        places += names
    check_once(places, pattern)
    return found


def check_once(names: Sequence[str], given: Any) -> None:
    """Refuse a file that is named twice, whose rows would come twice in a pass.

    Raises:
        ValueError: that names it.
    """
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{given!r} names {name!r} {times} times: name each file once, as a pass reads it once")


def files_expanded(files: Any) -> Any:
    """Files for a builder of the Datasets library, which knows stars, without braces: a pattern, a list, or either by split.

    Raises:
        ValueError: if a range counts backwards, or a file is named twice.
    """
    if isinstance(files, dict):
        return {split: files_expanded(some) for split, some in files.items()}
    texts = [files] if isinstance(files, str) else files
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return files
    found = [name for text in texts for name in expanded(text)]
    check_once(found, files)
    return files if found == texts else found


def check_there(names: Sequence[str]) -> None:
    """Refuse files that are not there, before a training comes to them: of those on this machine any, of those at URLs the
    first and the last, where a range ends too far.

    Raises:
        ValueError: that names one.
    """
    for name in names:
        path, missing = local_path(name), False
        if path is not None:
            missing = not path.exists()
        elif name in (names[0], names[-1]):
            fs, place = open_url(name)
            try:
                fs.info(place)
            except Exception as error:  # noqa: BLE001 (of other errors whoever reads it tells)
                missing = isinstance(told_by_server(error, name), FileNotFoundError)
        if missing:
            raise ValueError(f"cannot open {name!r}: there is no such file")


def without_query(url: str) -> str:
    """A URL without what a web address may end with, such as a signature that is another one tomorrow."""
    return url.partition("?")[0] if scheme_of(url) in WEB else url


@contextmanager
def opened(url: str, compression: str | None = None) -> Iterator[IO[bytes]]:
    """A file to be read from its beginning to its end.

    Args:
        url: of the file.
        compression: which fsspec is to undo.

    Raises:
        ValueError: that names it, if it is not there or cannot be opened; `UnreachableError` if it may be later.
    """
    from fsspec.compression import compr as known  # as commands that read no data need no fsspec

    if compression not in known:
        package = PACKAGES.get(compression or "", compression)
        raise ValueError(
            f"cannot open {url!r}: it needs the package {package}, which is not installed: pip install {package}"
        )
    fs, path = open_url(os.path.expanduser(url))
    try:
        if fs.protocol == "memory" and compression is None:  # whose files have one position for all readers
            file = io.BytesIO(fs.cat_file(path))
        else:
            file = fs.open(path, "rb", compression=compression)
    except Exception as error:
        told = told_by_server(error, url)
        kind = ValueError if isinstance(told, FINAL) else UnreachableError
        raise kind(f"cannot open {url!r}: {reason_of(told)}") from error
    with file:
        yield file


def told_by_server(error: Exception, url: str) -> Exception:
    """What is the matter with a file that could not be opened. Of web servers fsspec says that it is not there whatever they
    answer, also where they are busy; their answer is the cause."""
    cause = error.__cause__
    if not (isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and scheme_of(url) in WEB):
        return error
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    if status == 404:
        return error
    return PermissionError(str(cause)) if status in FORBIDDEN else cause


def reason_of(error: Exception) -> str:
    """What an error of a file system says, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder: name the files in it, such as FOLDER/*.tar or FOLDER/{000..099}.tar"
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
