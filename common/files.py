"""Files written whole or not at all, and files of one JSON object a line."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary path beside a file, which takes the file's place when the block ends without an error.

    Its folder is made if it is not there. A link stays a link: what it points to is replaced. After an error the file is
    as before, and nothing else is left.

    Args:
        path: of the file.

    Raises:
        OSError: if the folder cannot be made or written into; and what the block raises.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file have temporary files of their own.
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.open("xb").close()
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text, see `replaced`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write a file of one JSON value, see `replaced`; "NaN" and the like, which JSON lacks, are a ValueError."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


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
            line = text[: error.start].count(b"\n") + 1
            raise ValueError(
                f"line {line} of {name} is no UTF-8 text: {error.reason}; save the file as UTF-8"
            ) from error
    values = []
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
