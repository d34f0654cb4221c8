"""Imports point one way, and always go by the installed name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

#: What each part may import of the project; a part may always import itself, and `common`.
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "flows": set(),
    "vae": {"models"},
    "data": set(),
    "models": set(),
    "configs": set(),
    "pipeline": {"flows", "vae", "models"},
    "evaluation": {"flows", "vae", "data", "pipeline", "configs"},
    "training": {"flows", "vae", "data", "pipeline", "evaluation"},
    "demo": {"flows", "vae", "data", "pipeline", "models", "evaluation"},
    "cli": {"flows", "vae", "data", "pipeline", "models", "evaluation", "training", "demo", "configs"},
}
FILES = [file for part in MAY_IMPORT for file in sorted((ROOT / part).rglob("*.py"))]
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tarflow").rglob("*.py")]


def imports_of(file: Path) -> list[tuple[int, str]]:
    """Level and module of each import, at the top or inside functions; 0 is an absolute one."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "tarflow" else [module]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_parts_import_only_what_is_below_them(file: Path) -> None:
    part = file.relative_to(ROOT).parts[0]
    for _, module in imports_of(file):
        if module.split(".")[0] == "tarflow":
            assert module.split(".")[1] in MAY_IMPORT[part] | {part, "common"}, f"{part} imports {module}"


@pytest.mark.parametrize("file", [*FILES, *SCRIPTS], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_by_the_installed_name(file: Path) -> None:
    for level, module in imports_of(file):
        assert level == 0, f"{file.name} imports relatively: {module}"
        assert module.split(".")[0] not in MAY_IMPORT, f"{file.name} imports {module} instead of tarflow.{module}"


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == MAY_IMPORT.keys()
