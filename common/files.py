"""Files written whole or not at all, and files of one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary path beside a file, which takes the file's place when the block ends without an error.

    Its folder is made if it is not there. A link stays a link: what it points to is replaced. After an error the file is
    as before, and nothing else is left. A device or pipe, such as /dev/stdout, is written into.

    Args:
        path: of the file; a ``~`` at its beginning is the user's home.

    Raises:
        OSError: that names the file, if it cannot be written; and what the block raises.
    """
    path = Path(path).expanduser()
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            temporary.touch()
            yield temporary
            with path.open("wb") as file:
                file.write(temporary.read_bytes())
        return
    target = Path(os.path.realpath(path))
    try:
        with _replaced(target) as temporary:
            yield temporary
    except OSError as error:
        # The temporary name, or none at all, would tell the user nothing.
        if error.errno is not None and (error.filename is None or str(error.filename).endswith(".tmp")):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_special(path: Path) -> bool:
    """Whether a path is of a device or a pipe, which must not be replaced by a file.

    Standard streams are some even where they lead to a file. Files in /dev/shm, a disk in memory, are none.
    """
    if not path.exists() or path.is_dir():
        return False
    streams = "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/"
    return not path.is_file() or str(path).startswith(streams)


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file have temporary files of their own.
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.open("xb").close()
        usual = temporary.stat().st_mode
        yield temporary
        # Some libraries, safetensors for one, write files that their owner alone may read.
        mode = stat.S_IMODE(target.stat().st_mode if target.exists() else usual)
        if mode != stat.S_IMODE(temporary.stat().st_mode):
            temporary.chmod(mode)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Refuse a place that cannot be written to, before the work whose results are to go there.

    Nothing is made: folders that are missing come with the first file.

    Args:
        path: of the file, or of the folder, to write; a ``~`` at its beginning is the user's home.
        folder: whether it is a folder's.

    Raises:
        ValueError: that names it.
    """
    if not str(path):
        raise ValueError("the name of a file or folder to write is empty: give one")
    try:
        target = Path(path).expanduser()
        if is_special(target) and not folder:
            return
        target = Path(os.path.realpath(target))
        if target.is_dir() and not folder:
            raise ValueError(f"cannot write the file {str(path)!r}: it is a folder; name a file in it")
        place = target if folder else target.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"cannot write {str(path)!r}: {str(place)!r} is a file and no folder")
        probe = place / f".{secrets.token_hex(4)}.tmp"
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text, see `replaced`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any, indent: int | None = 2, nan_as_null: bool = False) -> None:
    """Write a file of one JSON value, see `replaced`; "NaN" and the like, which JSON lacks, are a ValueError.

    Args:
        path, value, indent: the file, what is written, and the spaces of a level.
        nan_as_null: write null for numbers that are not finite, such as the standard error of a single picture.
    """
    if nan_as_null:
        value = finite_or_none(value)
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    """A JSON value whose numbers that are not finite are None."""
    if isinstance(value, dict):
        return {name: finite_or_none(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_picture(path: str | Path, picture: Any, kind: str = "PNG", **options: Any) -> None:
    """Write a picture of Pillow's, see `replaced`.

    Args:
        path: of the file.
        picture: the ``PIL.Image.Image``.
        kind, options: the format and its options, as Pillow's ``save`` takes them.
    """
    with replaced(path) as temporary:
        picture.save(temporary, format=kind, **options)


def json_lines(text: str | bytes, name: str) -> list[tuple[int, Any]]:
    """The values of a text with one JSON value a line, with the numbers of their lines, from 1 on; empty lines have none.

    Lines end at line feeds alone: other characters that Python's ``splitlines`` knows may stand inside of JSON's texts.
    Bytes are UTF-8, with or without a byte order mark.

    Args:
        text: of the file.
        name: of the file, for the error.

    Raises:
        ValueError: that names file and line, for bytes that are no UTF-8 and lines that are no JSON.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n")
            raise ValueError(
                f"line {before + 1} of {name} is no UTF-8 text: {error.reason}; save the file as UTF-8"
            ) from error
    values: list[tuple[int, Any]] = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {name} is no JSON: {error}") from error
    return values


def read_json_lines(path: str | Path) -> list[tuple[int, Any]]:
    """`json_lines` of a file."""
    return json_lines(Path(path).read_bytes(), str(path))


def read_json(path: str | Path) -> Any:
    """What a JSON file has.

    Raises:
        ValueError: that names the file, if it is none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON file ({error}): remove it, or give another folder") from error


def keep_settings(path: str | Path, settings: Mapping[str, Any], what: str) -> None:
    """Note what decides the contents of a folder, or refuse a folder of others.

    Args:
        path: of the JSON file; its folder is the result's.
        settings: by name, as JSON knows them; of what an earlier version did not note nothing is refused.
        what: the folder has, such as "a comparison".

    Raises:
        ValueError: that names the first setting that is another one.
    """
    path = Path(path).expanduser()
    here = json.loads(json.dumps(settings))
    there = read_json(path) if path.is_file() else {}
    for name, value in here.items():
        if name in there and there[name] != value:
            raise ValueError(
                f"{str(path.parent)!r} has {what} with {name} {there[name]!r}, not {value!r}: give another folder"
            )
    write_json(path, there | here)
