"""Imports point one way, and always go by the installed name.

Which rooms a room may import its own ``__init__.py`` says, in a sentence "May import: …"; `common` and the room's own
files need no mention. ``name.*`` means a folder with all rooms in it.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

import tarflow

TOPS = [
    "benchmarks",
    "cli",
    "common",
    "configs",
    "data",
    "demo",
    "evaluation",
    "experiments",
    "flows",
    "models",
    "pipeline",
    "scripts",
    "training",
    "vae",
]
#: Every folder of code, by its name with dots, with what it says it may import.
ROOMS = {
    file.parent.relative_to(ROOT).as_posix().replace("/", "."): ast.get_docstring(ast.parse(file.read_text())) or ""
    for top in TOPS
    for file in sorted((ROOT / top).rglob("__init__.py"))
}
FILES = [file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))]
DOORS = [*ROOT.glob("*.py"), *(ROOT / "tarflow").glob("*.py")]
SAYS, NOTHING, ALL = "May import: ", "nothing else of the project", "everything but scripts"


def permitted(room: str) -> set[str]:
    """The rooms that a room may import, as its docstring says."""
    sentence = " ".join(ROOMS[room].partition(SAYS)[2].split()).removesuffix(".")
    if sentence == ALL:
        return ROOMS.keys() - {"scripts"}
    names = set() if sentence == NOTHING else set(sentence.split(", "))
    found = {"common", room}
    for name in names:
        family = name.removesuffix(".*")
        rooms = {other for other in ROOMS if other == family or (name != family and other.startswith(f"{family}."))}
        assert rooms, f"{room} may import {name}, which is no room"
        found |= rooms
    return found


@cache
def imports_of(file: Path) -> list[tuple[int, str]]:
    """Level and module of each import, at the top or inside functions; 0 is an absolute one."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            rooms = module == "tarflow" or module.removeprefix("tarflow.") in ROOMS
            found += [(node.level, name) for name in (names if rooms else [module])]
    return found


def room_of(module: str) -> str:
    """The innermost folder of a module of the project, or of one of the three classes that `tarflow` itself gives."""
    name = tarflow._MODULES.get(module.removeprefix("tarflow."), module).removeprefix("tarflow.")
    while name and name not in ROOMS:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_lives_there_and_what_it_may_import(room: str) -> None:
    sentence, found, _ = ROOMS[room].partition(SAYS)
    assert found, f"{room}/__init__.py lacks '{SAYS}…'"
    assert sentence.strip().endswith((".", "`")), f"{room}/__init__.py lacks a sentence on what lives there"
    permitted(room)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_rooms_import_only_what_they_say(file: Path) -> None:
    room = file.parent.relative_to(ROOT).as_posix().replace("/", ".")
    allowed = permitted(room)
    for _, module in imports_of(file):
        if module.startswith("tarflow."):
            assert room_of(module) in allowed, f"{room} imports {module}"


def test_no_room_imports_what_imports_it() -> None:
    uses: dict[str, set[str]] = {room: set() for room in ROOMS}
    for file in FILES:
        room = file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        uses[room] |= {room_of(module) for _, module in imports_of(file) if module.startswith("tarflow.")} - {room}
    left = dict(uses)
    while ends := [room for room, used in left.items() if not used & left.keys()]:
        for room in ends:
            del left[room]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("file", [*FILES, *DOORS], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_by_the_installed_name(file: Path) -> None:
    for level, module in imports_of(file):
        assert level == 0, f"{file.name} imports relatively: {module}"
        assert module.split(".")[0] not in TOPS, f"{file.name} imports {module} instead of tarflow.{module}"


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 200
    assert len(ROOMS) > 30
