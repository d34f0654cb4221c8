"""`tarflow models`: the pipelines that ship with the package."""

from __future__ import annotations

import re
from pathlib import Path

from tarflow.cli.parsing import CommandParser
from tarflow.models import FOLDER, shipped

DESCRIPTION = """List the pipelines that ship with this package, and what each draws.

  tarflow models
  tarflow generate "a red heart, noto style" --pipeline emoji --out heart.png"""


def main(argv: list[str]) -> None:
    CommandParser("tarflow models", DESCRIPTION).parse_args(argv)
    names = shipped()
    if not names:
        print("No pipelines ship with this version; `tarflow train` makes one.")
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {first_sentence(FOLDER / name / 'README.md')}".rstrip())


def first_sentence(card: Path) -> str:
    """Of a model card in Markdown, without its metadata and headings; empty if there is no card."""
    if not card.is_file():
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines()]
    prose = " ".join(line for line in lines if line and line[0] not in "#!<|`")
    return re.split(r"(?<=[.!?])\s", prose, maxsplit=1)[0]
