"""The pictures that the pipeline `emoji` is trained on: copies of captioned emoji, each cut anew and called otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

from PIL import Image

from tarflow.common.files import json_lines, write_picture, write_text
from tarflow.data.captions import METADATA
from tarflow.data.files import Files
from tarflow.data.folder import flattened, is_held_out, read_image

Row = dict[str, Any]

SIDE = 64
WHITE = (255, 255, 255)
#: Copies of a picture, and of one with a skin tone; those are two of five pictures, and would crowd out the rest.
COPIES, TONED_COPIES = 5, 2
TONES = ("light", "medium-light", "medium light", "medium", "medium-dark", "medium dark", "dark")
#: Styles of which a share of the pictures is held out, by a hash of caption and style.
HELD_OUT_STYLES, HELD_OUT = ("twemoji", "noto", "fluent"), 0.03
#: Share of the names of which no picture is taken, of whatever style.
UNSEEN = 0.02
#: How many pictures a process makes at a time.
AT_A_TIME = 200


def has_tone(name: str) -> bool:
    """Whether a name tells a skin tone."""
    return "skin tone" in name or any(name.endswith(f" {tone}") for tone in TONES)


def with_article(words: str, chance: random.Random) -> str:
    """Words after "a" or "an", one in four times after "the"."""
    if chance.random() < 0.25:
        return f"the {words}"
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


def captions_of(row: Row, copies: int, names: Collection[str], chance: random.Random) -> list[str]:
    """A caption for each copy: the name, the name with an article, name and keywords, then single words, the name's last one
    first, with or without an article. A keyword that is another emoji's name is left to that one: "a sun" is no sunset.

    Args:
        row: with ``text``, the name, ``style`` and maybe ``keywords``.
        copies: of the picture.
        names: of all emoji, in small letters.
        chance: chooses words and articles.
    """
    name = row["text"]
    keywords = [word for word in row.get("keywords") or [] if word.lower() != name.lower() and "skin tone" not in word]
    named = with_article(name, chance)
    found = [name, named, ", ".join([name, *keywords]) if keywords else named]
    words = [word for word in keywords if word.lower() not in names]
    chance.shuffle(words)
    *before, last = name.split()
    if before and last.isalpha() and ":" not in name and not has_tone(name):
        words = [last, *(word for word in words if word != last)]
    for copy in range(copies - len(found)):
        word = words[copy % len(words)] if words else name
        found.append(with_article(word, chance) if chance.random() < 0.6 else word)
    return [f"{caption}, {row['style']} style" for caption in found[:copies]]


def cut(picture: Image.Image, chance: random.Random) -> Image.Image:
    """A square of 0.92 to 1.08 of the picture's side around a point near its middle, at `SIDE` pixels; white where there is
    no picture."""
    side = picture.width
    size = side * chance.uniform(0.92, 1.08)
    left, top = ((side - size) / 2 + side * chance.uniform(-0.05, 0.05) for _ in range(2))
    box = left, top, left + size, top + size
    return picture.transform((SIDE, SIDE), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor="white")


@cache
def opened(source: str) -> Files:
    """An archive or folder, listed once by each process."""
    return Files(source)


def copies_of(source: str, rows: Sequence[Row], folder: Path, names: Collection[str]) -> list[Row]:
    """Write the copies of some pictures: the first is the whole picture, the others are cut anew. Returns their rows, each with
    a ``caption``.

    Args:
        source: the archive or folder that the rows are of.
        rows: of its ``metadata.jsonl``.
        folder: to write into, with the folders ``train`` and ``validation``.
        names: of all emoji, in small letters.
    """
    files, made = opened(source), []
    for row in rows:
        name, style = row["file_name"], row["style"]
        held_out = style in HELD_OUT_STYLES and is_held_out(f"{row['text']}, {style} style", HELD_OUT)
        if not held_out and is_held_out(row["text"], UNSEEN):
            continue
        picture = flattened(read_image(partial(files.read, name), files.place(name)), WHITE)
        resized = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        copies = 1 if held_out else TONED_COPIES if has_tone(row["text"]) else COPIES
        for copy, caption in enumerate(captions_of(row, copies, names, random.Random(f"c {name}"))):
            image = cut(picture, random.Random(f"{name} {copy}")) if copy else resized
            path = f"{'validation' if held_out else 'train'}/{stem_of(name)}_{copy}.png"
            write_picture(folder / path, image, compress_level=1)
            made.append({"file_name": path, "caption": caption, "text": row["text"], "style": style})
    return made


def write_emoji_pictures(sources: Sequence[str], folder: Path, processes: int | None = None) -> int:
    """Write the copies of all pictures, and a ``metadata.jsonl``; returns how many there are.

    Args:
        sources: archives or folders with a ``metadata.jsonl`` of names, ``text``, and styles, ``style``.
        folder: to write into.
        processes: that share the work; None takes as many as there are processors.

    Raises:
        ValueError: for files that cannot be read, or rows without name or style.
    """
    found = {source: read_rows(source) for source in sources}
    check_rows(found)
    names = frozenset(row["text"].lower() for rows in found.values() for row in rows)
    jobs = []
    for source, rows in found.items():
        jobs += [(source, rows[start : start + AT_A_TIME]) for start in range(0, len(rows), AT_A_TIME)]
    with ProcessPoolExecutor(processes) as pool:
        parts = pool.map(copies_of, *zip(*jobs, strict=True), repeat(folder), repeat(names))
        made = [row for part in parts for row in part]
    write_text(folder / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    return len(made)


def stem_of(name: str) -> str:
    """What the files of a picture's copies are called by."""
    return name.replace("/", "_").rsplit(".", 1)[0]


def check_rows(found: Mapping[str, Sequence[Row]]) -> None:
    """An error if there is nothing to write, or two pictures would be written to the same files.

    Args:
        found: rows by source.
    """
    if not any(found.values()):
        raise ValueError(f"no row is left of {', '.join(map(repr, found))}: OpenMoji's are left out")
    taken: dict[str, tuple[str, str]] = {}
    for source, rows in found.items():
        for row in rows:
            here = (source, row["file_name"])
            there = taken.setdefault(stem_of(row["file_name"]), here)
            if there != here:
                raise ValueError(
                    f"{here[1]!r} of {here[0]!r} and {there[1]!r} of {there[0]!r} would be one file: rename one of them"
                )


def read_rows(source: str) -> list[Row]:
    """The rows of a ``metadata.jsonl``, but those of OpenMoji, whose licence asks for the same of what is made of it."""
    place = f"{METADATA} in {source!r}"
    files = Files(source)
    if METADATA not in files.names:
        raise ValueError(f"there is no {place}: give an archive or folder of captioned pictures")
    rows = json_lines(files.read(METADATA), place)
    for number, row in rows:
        for column in ("file_name", "text", "style"):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise ValueError(f"line {number} of {place} has no text {column!r}")
    return [row for _, row in rows if row["style"] != "openmoji"]
