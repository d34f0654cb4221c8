"""`tarflow configs`: the configurations that ship with the package."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path

from tarflow import configs
from tarflow.cli.parsing import CommandParser

DESCRIPTION = """List the configurations that ship with this package, and what each is for; with a name, print where the
file is.

  tarflow configs
  cp "$(tarflow configs quickstart_text)" mine.yaml
  accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli train --config mine.yaml

Those under accelerate/ are the launcher's; all others are taken by --config, also by their bare names."""


def main(argv: list[str]) -> None:
    parser = CommandParser("tarflow configs", DESCRIPTION, "[NAME]")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a configuration, for example accelerate/ddp")
    name = parser.parse_args(argv).name
    known = [*configs.shipped(), *configs.launchers()]
    if name is None:
        for one in known:
            print(f"{one:<{max(map(len, known))}}  {purpose(configs.FOLDER / f'{one}.yaml')}".rstrip())
        return
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"unknown configuration {name!r}; {hint}")
    print(configs.FOLDER / f"{name}.yaml")


def purpose(file: Path) -> str:
    """The first sentence of the comment that a configuration begins with; empty without one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    told = itertools.takewhile(lambda line: re.match(r"# \S", line), lines)  # commands are indented
    sentence = re.split(r"(?<=[.!?])\s", " ".join(line[2:] for line in told), maxsplit=1)[0]
    return sentence.removesuffix(":")
