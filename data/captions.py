"""Captions and names of classes: from the columns of a row, and from ``metadata.jsonl``."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tarflow.common.files import json_lines
from tarflow.data.config import DataConfig
from tarflow.data.files import Files, shown

METADATA = "metadata.jsonl"


def read_metadata(files: Files, images: Sequence[str], left_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of every ``metadata.jsonl``, whose file names count from its own folder, with names as `Files` has them.

    Args:
        files: the data.
        images: names of its pictures.
        left_out: names of pictures that are not wanted; rows of theirs are dropped.

    Raises:
        ValueError: for lines that cannot be read, pictures without a row, and rows without a picture.
    """
    # Systems write accents in names in two ways, as one character or as two.
    known = {unicodedata.normalize("NFC", name): name for name in [*images, *left_out]}
    known |= {name: name for name in [*images, *left_out]}
    rows: list[dict[str, Any]] = []
    absent: list[str] = []
    for metadata in (name for name in files.names if name.split("/")[-1] == METADATA):
        folder, place = metadata.removesuffix(METADATA), f"{shown(metadata)} in {str(files.path)!r}"
        try:
            content = files.read(metadata)
        except Exception as error:  # whatever it is: damaged archives have many
            raise ValueError(f"cannot read {place}: {error}") from error
        for number, row in json_lines(content, place):
            if not isinstance(row, dict) or "file_name" not in row:
                raise ValueError(f"line {number} of {place} is no JSON object with a file_name")
            name = row["file_name"]
            if not isinstance(name, str):
                raise ValueError(f"line {number} of {place} has the file_name {name!r}, expected a text")
            wanted = [folder + name.removeprefix("./"), folder + name.replace("\\", "/")]
            found = next((known[form] for one in wanted for form in forms(one) if form in known), None)
            if found is None:
                absent.append(name)
            else:
                rows.append({**row, "file_name": found})
    if unnamed := sorted(set(images) - {row["file_name"] for row in rows}):
        raise ValueError(
            f"captions are missing for {len(unnamed)} of {len(images)} images in {str(files.path)!r}, first "
            f"{shown(unnamed[0])!r}: add them to {METADATA} or remove the images"
        )
    if absent:
        raise ValueError(
            f"{METADATA} in {str(files.path)!r} names {len(absent)} absent images, first {absent[0]!r}: "
            "add them, or take their lines out"
        )
    unwanted = set(left_out)
    return [row for row in rows if row["file_name"] not in unwanted]


def forms(name: str) -> tuple[str, str]:
    return name, unicodedata.normalize("NFC", name)


def keep(record: dict[str, Any], config: DataConfig) -> bool:
    """Whether a row has one of the wanted values in every column of ``where``."""
    for column, values in (config.where or {}).items():
        if column not in record:
            template = config.caption_template or ""
            also = (
                f" and --data.caption_template null, as {template!r} names it too"
                if column in columns_of(template)
                else ""
            )
            raise ValueError(
                f"data.where names the column {column!r}, but the data has {', '.join(sorted(record))}: give --data.where "
                f"null for all pictures{also}"
            )
        if record[column] not in values:
            return False
    return True


def make_captions(record: dict[str, Any], config: DataConfig, name: str) -> list[str]:
    """The captions of one row: by template or column ("text" if neither is given), then others of further templates."""
    return [fill(template, record, name) for template in templates_of(record, config)]


def templates_of(record: dict[str, Any], config: DataConfig) -> list[str]:
    """The templates of a row's captions: the first, and those of the others whose columns it has."""
    column = config.caption_column or "text"
    more = (
        template
        for template in config.more_caption_templates
        if all(record.get(part, "absent") not in ("", [], None) for part in columns_of(template))
    )
    return [config.caption_template or "{" + column + "}", *more]


def columns_of(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        ValueError: if its braces do not fit together.
    """
    try:
        return [part for _, part, _, _ in string.Formatter().parse(template) if part]
    except ValueError as error:
        raise ValueError(f"the caption template {template!r} is wrong: {error}") from error


def fill(template: str, record: dict[str, Any], name: str) -> str:
    """A template with the values of a row; lists are joined by commas."""
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()}
    whole = template[1:-1] in texts  # a column alone, of whatever name
    empty = [] if whole else [column for column in columns_of(template) if column in texts and texts[column] is None]
    if empty:
        raise ValueError(f"the row of {shown(name)!r} has no value in the column {empty[0]!r}, which its caption needs")
    try:
        caption = texts[template[1:-1]] if whole else template.format(**texts)
    except KeyError as error:
        columns = ", ".join(sorted(record))
        raise ValueError(
            f"the row of {shown(name)!r} has no column {error} for its caption; it has {columns}: give "
            "--data.caption_template of these, or null and --data.caption_column"
        ) from error
    except (IndexError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the caption template {template!r} does not fit the row of {shown(name)!r}: {error}"
        ) from error
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"the caption of {shown(name)!r} is {caption!r}, expected a text that is not empty")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the caption of {shown(name)!r} is {caption!r}, which has half of a character that takes two: write it anew"
        ) from error
    return caption


def readable_names(classes: list[str], names: dict[str, Any] | list[Any] | None) -> tuple[str, ...]:
    """Names of the classes, from a mapping or a list of the same length.

    Raises:
        ValueError: if some are lacking, or two classes get the same name.
    """
    if names is None:
        found = tuple(classes)
    elif isinstance(names, dict):
        if missing := [name for name in classes if name not in names]:
            known = ", ".join(repr(name) for name in list(names)[:10])
            raise ValueError(
                f"data.class_names lacks the classes {', '.join(missing[:10])}; it has {known}. Give --data.class_names null for the "
                "folders' own names; in YAML, put names such as 01, no or 1e3 in quotes"
            )
        found = tuple(names[name] for name in classes)
    elif len(names) != len(classes):
        raise ValueError(f"data.class_names has {len(names)} names, but the data has {len(classes)} classes")
    else:
        found = tuple(names)
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise ValueError(f"{len(twice)} names stand for several classes, first {twice[0]!r}: give each its own")
    return found
