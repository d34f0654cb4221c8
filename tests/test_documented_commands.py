"""Every command of README and docs, copied out of them, goes as far as its settings are checked; none may rot.

They run in one process, in a folder with the files that they name. What comes next, the work itself, is stopped where the
libraries would be loaded for it: other tests do it in a small form.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from tarflow.cli import parsing
from tarflow.cli.main import COMMANDS, main
from tarflow.models import shipped

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").rglob("README.md"))]
#: Old commands are told as they were.
TEXTS.remove(ROOT / "docs" / "LOG.md")
#: What the scripts at the top are.
TOP = {
    "train_latent.py": ["train"],
    "train_student.py": ["train-student"],
    "evaluate_fid.py": ["evaluate", "fid"],
    "evaluate_bpd.py": ["evaluate", "likelihood"],
    "quickstart.py": ["train", "--config", "quickstart_text"],
}
#: What stands for "…" behind an option; elsewhere it is left out.
ANY = {"--data.source": "drawings", "--gen.data.path": "emoji.zip"}
ANY_CONFIG = {"train": "quickstart_text", "train-vae": "vae_emoji", "train-student": "student_drawings"}
#: What stands for variables that the reader is told to set.
VARIABLES = {
    "$EMOJI": "emoji.zip",
    "$NETTE": "nette.zip",
    "$X": "--extractor mobilenet_v2 --extractor-weights mobilenet_v2.safetensors",
    "$ddp": "accelerate launch -m",
}
OURS = re.compile(r"^(?:OMP_NUM_THREADS=\d+ )?(?:exec )?(tarflow|python3?|accelerate launch|\.venv/bin/\w+)\b")
LAUNCHER = (
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
)


class CheckedError(Exception):
    """Raised where a command would load its libraries: its settings are right."""


def shell_lines(text: str) -> Iterator[str]:
    """Lines of a text's blocks of shell commands, those that go on in the next line joined, without comments."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind in ("bash", "sh", "console", ""):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                yield re.sub(r"(?:^|\s+)#.*", "", line).removeprefix("$ ").strip()


def block_commands(file: Path) -> list[str]:
    """Commands of this project in a text's blocks, with the variables that are set there."""
    variables, found = dict(VARIABLES), []
    for line in shell_lines(file.read_text(encoding="utf-8")):
        if set_here := re.fullmatch(r'(\w+)="([^"]*)"', line):
            variables[f"${set_here[1]}"] = VARIABLES.get(f"${set_here[1]}", set_here[2])
            continue
        for name, value in variables.items():
            line = re.sub(re.escape(name) + r"\b", lambda _, value=value: value, line)
        if OURS.match(line) and "-c " not in line and "pip install" not in line:
            found.append(line.replace('"$@"', "--tool encode --out encode.png"))
    return found


def inline_commands(file: Path) -> list[str]:
    """Commands inside of a text's sentences, which may be fragments."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = [" ".join(command.split()) for command in re.findall(r"`([^`]+)`", text)]
    return [command for command in found if OURS.match(command) and " -c " not in command and "pip" not in command]


def words_of(command: str) -> list[str]:
    """The words of `tarflow` for a command, whichever way it is called; empty for what is none of its commands."""
    words = shlex.split(OURS.sub(r"\1", command))
    if words[0] == "accelerate":
        words = words[2:]
        while words and words[0] in (*LAUNCHER, "--cpu", "…"):
            words = words[2 if words[0] in LAUNCHER else 1 :]
    elif words[0] != "tarflow":
        words = words[1:]
    if words and words[0] == "-m":
        words = words[1:]
    if not words:
        return []
    first, rest = words[0], words[1:]
    if first in ("tarflow", "tarflow.cli"):
        return rest
    if first in TOP:
        return TOP[first] + rest
    if script := re.fullmatch(r"(?:scripts/(\w+)\.py|tarflow\.scripts\.(\w+))", first):
        door = ROOT / "scripts" / f"{script[1] or script[2]}.py"
        name = re.search(r"The command `tarflow ([\w-]+)`", door.read_text(encoding="utf-8"))
        return [name[1], *rest] if name else []
    return []


def filled_in(words: list[str]) -> list[str]:
    """Words with something for each "…"."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        if word != "…":
            found.append(word.replace("tests/reference/*/", str(ROOT / "tests" / "reference" / "starflow_text")))
        elif before == "--config":
            found.append(ANY_CONFIG.get(words[0], "decoder"))
        elif before.startswith("--"):
            found.append(ANY[before])
    return found


def make_files(words: list[str], folder: Path) -> None:
    """Make what a command takes for granted: archives, caches, pipelines, statistics, checkpoints."""
    for option, value in itertools.pairwise(words):
        path = folder / value
        if (
            (option.endswith(".path") and value.endswith(".zip"))
            or option == "--checkpoint"
            or (option == "--config" and words[0] == "convert")
        ):
            path.touch()
        elif option.endswith(".path") or option in ("--ref", "--samples"):
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").touch()
        elif option.endswith("pipeline") and value not in shipped():
            path.mkdir(parents=True, exist_ok=True)
            (path / "model_index.json").write_text("{}")


ALL = [(file, command) for file in TEXTS for command in block_commands(file)]
FRAGMENTS = [(file, command) for file in TEXTS for command in inline_commands(file)]


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
    for archive in ("emoji.zip", "nette.zip", "pictures.zip", "my_pictures.zip", "imagenette-64.zip"):
        (tmp_path / archive).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(case: tuple[Path, str]) -> str:
    return f"{case[0].relative_to(ROOT)}: {case[1][:80]}"


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


def test_there_are_commands_to_try() -> None:
    assert len(ALL) > 25 and len(FRAGMENTS) > 15 and len(python_blocks()) > 5
    assert {"generate", "train", "evaluate", "sweep"} <= {words_of(command)[0] for _, command in ALL}
