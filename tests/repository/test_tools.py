"""The tools of who works on the project: what `make` and the commit hooks run, and that the package tells its types."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib

import pytest
import yaml
from helpers import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> list[str]:
    """The commands of one target, by what they run: "ruff check .", "pytest"."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None
    return [line.strip().removeprefix(".venv/bin/python -m ") for line in found[1].splitlines()]


def test_all_tests_come_after_every_fast_check() -> None:
    fast, whole = recipe("check"), recipe("test")
    assert fast[:-1] == whole[:-1] == ["ruff check .", "ruff format --check .", "mypy"]
    assert whole[-1] == "pytest -n 2 --dist loadfile"
    names = re.search(r"^FAST_TESTS = ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert names is not None
    files = names[1].replace("\\", "").split()
    assert len(files) > 5 and all((ROOT / file).is_file() for file in files)


def test_commit_hooks_are_local_and_run_installed_tools() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in settings["repos"]] == ["local"]
    tools = []
    for hook in settings["repos"][0]["hooks"]:
        assert hook["language"] == "system", hook["id"]
        python, option, tool = hook["entry"].split()[:3]
        assert (python, option) == ("python", "-m"), hook["id"]
        tools.append(tool)
    assert {"ruff", "mypy", "pytest"} == set(tools)
    wanted = " ".join(SETTINGS["project"]["optional-dependencies"]["dev"])
    assert all(tool in wanted and importlib.util.find_spec(tool) for tool in tools)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_what_tools_keep_is_not_for_commits() -> None:
    done = subprocess.run(
        ["git", "check-ignore", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".venv/", "tarflow.egg-info/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(done.stdout.split()) == 5, done.stdout + done.stderr


def test_tests_stand_in_rooms_and_share_modules_that_are_no_tests() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert [file.name for file in files if file.parent == ROOT / "tests"] == []
    names = [file.name for file in files]
    assert [name for name in names if names.count(name) > 1] == []
    shared = re.compile(r"^ *(?:from|import) test_", re.MULTILINE)
    assert [file.name for file in files if shared.search(file.read_text(encoding="utf-8"))] == []
    rooms = {file.relative_to(ROOT / "tests").parts[0] for file in files}
    assert [room for room in rooms - {"repository"} if not (ROOT / room / "__init__.py").is_file()] == []
