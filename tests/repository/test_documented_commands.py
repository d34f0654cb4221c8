"""Every command of README and docs, copied out of them, goes as far as its settings are checked; none may rot.

They run in one process, in a folder with the files that they name. What comes next, the work itself, is stopped where the
libraries would be loaded for it: test_documented_runs.py does it in a small form.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import zipfile
from pathlib import Path

import pytest
from documented import ALL, FRAGMENTS, TEXTS, filled_in, named, words_of
from helpers import ROOT

from tarflow.cli import parsing
from tarflow.cli.main import COMMANDS, main
from tarflow.models import shipped


class CheckedError(Exception):
    """Raised where a command would load its libraries: its settings are right."""


def make_archive(path: Path) -> None:
    """Make one that lists a picture: archives without any are refused at once."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("picture.png", b"")


def make_files(words: list[str], folder: Path) -> None:
    """Make what a command takes for granted: archives, caches, pipelines, statistics, checkpoints."""
    for option, value in itertools.pairwise(words):
        path = folder / value
        if option.endswith(".path") and value.endswith(".zip"):
            make_archive(path)
        elif option == "--checkpoint" or (option == "--config" and words[0] == "convert"):
            path.touch()
        elif option.endswith(".path") or option in ("--ref", "--samples"):
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").touch()
            (path / "picture.png").touch()
        elif option.endswith(("pipeline", "init_from")) and value not in shipped():
            path.mkdir(parents=True, exist_ok=True)
            (path / "model_index.json").write_text("{}")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to run in, with libraries that are not loaded."""

    def stop() -> None:
        raise CheckedError

    # All are imported first: one that is imported later would keep what stands there now.
    modules = [importlib.import_module(f"tarflow.cli.{name.replace('-', '_')}") for name in COMMANDS]
    for module in (parsing, *modules):
        if hasattr(module, "loading"):
            monkeypatch.setattr(module, "loading", stop)
    make_files(["--pipeline", "runs/quickstart/pipeline"], tmp_path)  # which configs/fid_example.yaml names
    (tmp_path / "runs" / "vae_f16").mkdir()  # which configs/emoji128_f16.yaml names
    for archive in ("emoji.zip", "nette.zip", "pictures.zip", "my_pictures.zip", "imagenette-64.zip"):
        make_archive(tmp_path / archive)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", ALL, ids=named)
def test_commands_in_blocks_are_right(case: tuple[Path, str], stopped: Path, capsys: pytest.CaptureFixture) -> None:
    words = filled_in(words_of(case[1]))
    assert words, f"{case[1]!r} is no command of this project"
    make_files(words, stopped)
    try:
        main(words)
    except CheckedError:
        return
    except SystemExit as ended:
        assert not ended.code, capsys.readouterr().err
    assert words[0] in ("models", "configs", "--help"), f"{case[1]!r} ended before its settings were checked"


def help_of(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The help of a command, or of a command of a command."""
    nested = 2 if words[0] in ("evaluate", "benchmark") else 1
    nested = 3 if words[:2] == ["evaluate", "fid"] else nested
    capsys.readouterr()
    try:
        main([*(word for word in words[:nested] if not word.startswith("-")), "--help"])
    except SystemExit as ended:
        assert not ended.code, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("case", FRAGMENTS, ids=named)
def test_options_in_sentences_exist(case: tuple[Path, str], capsys: pytest.CaptureFixture) -> None:
    try:
        words = words_of(case[1])
    except ValueError:  # no whole quotation
        words = words_of(case[1].replace("'", " "))
    if not words:
        return  # a script of the project's own tools, or another program
    if words[0] in ("--help", "--version", "COMMAND"):
        return
    assert words[0] in COMMANDS, case[1]
    text = help_of(words, capsys)
    for word in words[1:]:
        option = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][\w.-]*", option) and option != "--help":
            names = {option, option.replace("-", "_").replace("__", "--", 1), re.sub(r"\.[^.]*$", "", option)}
            assert any(re.search(rf"{re.escape(name)}(?![\w-])", text) for name in names), f"{case[1]!r}: {option}"


def python_blocks() -> list[tuple[Path, str]]:
    """Python in blocks and behind ``python -c``, which names modules of the project."""
    found = []
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        codes = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        codes += re.findall(r'python -c "\n?(.*?)"\n', text, re.DOTALL)
        found += [(file, code) for code in codes if "tarflow" in code]
    return found


@pytest.mark.parametrize("case", python_blocks(), ids=named)
def test_what_python_imports_is_there(case: tuple[Path, str]) -> None:
    for node in ast.walk(ast.parse(case[1])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tarflow"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_launcher_is_given_a_file_of_settings() -> None:
    """Without one it prints a remark on each of its defaults."""
    sources = [*(ROOT / "cli").glob("*.py"), *ROOT.glob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    lines = [line for path in sources for line in path.read_text(encoding="utf-8").splitlines()]
    commands = [line[line.index("accelerate launch") :] for line in lines if "accelerate launch " in line]
    commands += [command for _, command in (*ALL, *FRAGMENTS) if command.startswith("accelerate launch ")]
    assert len(commands) > 12
    wrong = [command for command in commands if "--config_file" not in command and " --cpu" not in command]
    assert wrong == []


def test_there_are_commands_to_try() -> None:
    assert len(ALL) > 25 and len(FRAGMENTS) > 15 and len(python_blocks()) > 5
    assert {"generate", "train", "evaluate", "sweep"} <= {words_of(command)[0] for _, command in ALL}
