"""What ``pip install tarflow`` brings: all that its messages and cards name, and nothing of one machine."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

from tarflow import configs
from tarflow.cli.main import COMMANDS, SCRIPTS, main

LEFT_OUT = {".git", ".venv", "runs", "build", "dist", "node_modules"}
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('../dist'), build_meta.build_sdist('../dist'))"


def left_out(folder: str, names: list[str]) -> set[str]:
    return LEFT_OUT & set(names) | {name for name in names if name.endswith((".egg-info", ".safetensors", ".png"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The unpacked wheel, and the unpacked source distribution, of a copy whose large files are empty."""
    work = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, work / "copy", ignore=left_out, symlinks=True)
    (work / "copy" / "models" / "emoji" / "decoding.json").write_text("{}")
    for file in ROOT.glob("models/*/*/*.safetensors"):
        (work / "copy" / file.relative_to(ROOT)).touch()
    (work / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=work / "copy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,), (source,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "wheel")
    with tarfile.open(source) as archive:
        archive.extractall(work / "source", filter="data")
    (unpacked,) = (work / "source").iterdir()
    return work / "wheel", unpacked


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_scripts_configurations_and_models(built: tuple[Path, Path]) -> None:
    found = contents(built[0] / "tarflow")
    for part in ("cli", "scripts", "configs", "models", "common", "training", "pipeline"):
        wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / part).rglob("*") if path.is_file()}
        wanted = {name for name in wanted if "__pycache__" not in name and not name.endswith("/decoding.json")}
        assert {name for name in found if name.startswith(f"{part}/")} == wanted
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} < found
    assert {"configs/accelerate/ddp.yaml", "configs/decoder.yaml", "scripts/sweep.py"} < found
    assert "py.typed" in found  # who uses the package sees its types
    assert {path.relative_to(built[0]).parts[0] for path in built[0].iterdir()} == {
        "tarflow",
        "tarflow-0.1.0.dist-info",
    }


def test_the_source_distribution_has_what_a_clone_has(built: tuple[Path, Path]) -> None:
    found = contents(built[1])
    wanted = {path.name for path in ROOT.glob("*.py")} | {"README.md", "CHANGELOG.md", "Makefile", "LICENSE"}
    wanted |= {"tarflow/py.typed"}
    for pattern in ("configs/**/*.yaml", "docs/*.md", "tests/**/*.py", "tests/reference/**/*", "scripts/*.py"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name and not name.endswith((".safetensors", ".png"))}
    assert wanted - found == set()
    assert not [name for name in found if name.endswith((".pyc", "decoding.json"))]


#: Files of the project as texts name them: by folder, or the scripts at the top.
NAMED = re.compile(
    r"(?<![\w/.-])((?:scripts|configs|docs|tests)/[\w/.-]*\w)|\b((?:train_\w+|evaluate_\w+|quickstart)\.py)\b"
)
MODULE = re.compile(r"tarflow\.scripts\.(\w+)")
COMMAND = re.compile(r"(?:`|\(|^ {2,}|with |by )tarflow (\w[\w-]*)", re.MULTILINE)
LAUNCHER = re.compile(r"tarflow configs (accelerate/\w+)")
#: Where a file of somebody else is named, or one of the repository is said to be there.
ELSEWHERE = re.compile(r"ml-starflow|ml-tarflow|repository|in a clone")


def texts(file: Path) -> list[str]:
    """All that a file may show: of Python its constants, docstrings and messages; of others paragraphs."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.split(r"\n\n", text)
    return [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and is_text(node.value)]


def is_text(value: object) -> bool:
    return isinstance(value, str) and not value.endswith("/")


def test_all_that_texts_of_the_package_name_is_there(built: tuple[Path, Path]) -> None:
    package = built[0] / "tarflow"
    found, wrong, seen = contents(package), [], 0
    for name in sorted(found):
        if not name.endswith((".py", ".yaml", ".md")) or name.startswith("docs/"):  # those are of a clone
            continue
        for text in texts(package / name):
            modules = [f"scripts/{module}.py" for module in MODULE.findall(text) if module != "NAME"]
            files = [f"configs/{launcher}.yaml" for launcher in LAUNCHER.findall(text)] + modules
            if not ELSEWHERE.search(text):
                files += ["".join(groups) for groups in NAMED.findall(text)]
            wrong += [f"{name}: {file}" for file in files if file not in found]
            commands = COMMAND.findall(text)
            wrong += [f"{name}: tarflow {command}" for command in commands if command not in (*COMMANDS, "COMMAND")]
            seen += len(files) + len(commands)
    allowed = {"scripts/screenshot_demo.py: docs/demo.png", "configs/__init__.py: configs/NAME.yaml"}  # made; any name
    assert set(wrong) <= allowed
    assert seen > 40


def test_the_installed_package_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Its commands from elsewhere: every script can be imported, and shipped configurations are found."""
    code = """
import importlib, sys, pathlib, tarflow
assert pathlib.Path(tarflow.__file__).is_relative_to(sys.argv[1]), tarflow.__file__
from tarflow.cli.main import SCRIPTS, main
for name in SCRIPTS:
    assert callable(importlib.import_module(f"tarflow.scripts.{name}").main), name
main(["configs", "accelerate/ddp"])
from tarflow.benchmarks.random_models import shape_of
assert shape_of("quickstart_class").arguments
from tarflow.scripts.finetune_decoder import main
main(["--config", "configs/decoder.yaml", "--pipeline", "none", "--data.source", "folder"])
"""
    environment = {**os.environ, "PYTHONPATH": str(built[0]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(built[0])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{built[0] / 'tarflow/configs/accelerate/ddp.yaml'}\n", done.stderr[-3000:]
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr[-3000:]


def test_scripts_are_doors() -> None:
    """Each leads to a command of its own, but for those for work on the project itself."""
    doors = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__"}
    for name, text in doors.items():
        command = re.search(r"The command `tarflow ([\w-]+)`", text)
        assert (command is None) == (name in SCRIPTS), name
        assert command is None or command[1] in COMMANDS, name
        assert len(text.splitlines()) <= 40, name


def test_help_names_all(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*SCRIPTS, *COMMANDS))
    assert max(map(len, printed.splitlines())) <= 120


def folders() -> dict[str, str]:
    """The top-level folders with code, by the module that each becomes."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    mapped = settings["package-dir"].items()
    return {module: folder for module, folder in mapped if "." in module and (ROOT / folder / "__init__.py").is_file()}


def test_every_package_is_listed() -> None:
    """What the list lacks would be in no wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    there = {f"tarflow.{f.parent.relative_to(ROOT).as_posix()}" for top in folders().values() for f in inits(top)}
    assert set(settings["packages"]) == {name.replace("/", ".") for name in there} | {"tarflow", "tarflow.docs"}


def inits(top: str) -> list[Path]:
    return [file for file in (ROOT / top).rglob("__init__.py") if "__pycache__" not in file.parts]


@pytest.mark.skipif(not (ROOT / "tarflow" / "flows").is_dir(), reason="this checkout holds no links")
def test_plain_paths_lead_to_every_folder() -> None:
    """Type checkers and editors read no import hooks: they find `tarflow.flows` as `tarflow/flows`, a link."""
    links = {path.name: path.readlink().as_posix() for path in (ROOT / "tarflow").iterdir() if path.is_symlink()}
    assert links == {folder: f"../{folder}" for folder in folders().values()}


def test_a_checkout_without_links_runs(tmp_path: Path) -> None:
    """There a link is a text file with the path; the hook of the installation leads to the folders then."""
    (tmp_path / "clone" / "tarflow").mkdir(parents=True)
    shutil.copy(ROOT / "tarflow" / "__init__.py", tmp_path / "clone" / "tarflow")
    for folder in ("common", "configs"):
        (tmp_path / "clone" / "tarflow" / folder).write_text(f"../{folder}")
        shutil.copytree(ROOT / folder, tmp_path / "clone" / folder)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    settings = (tmp_path / "clone" / "pyproject.toml").read_text(encoding="utf-8")
    for module in {*re.findall(r'^    "(tarflow\.[\w.]+)",$', settings, re.MULTILINE)}:
        if module not in ("tarflow.common", "tarflow.configs"):
            settings = re.sub(rf'^ *"{re.escape(module)}"(,| = .*)$\n', "", settings, flags=re.MULTILINE)
    (tmp_path / "clone" / "pyproject.toml").write_text(settings, encoding="utf-8")
    build = "from setuptools import build_meta; build_meta.build_editable('../dist')"
    (tmp_path / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path / "clone", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import site
site.addsitedir({str(tmp_path / "site")!r})
import tarflow.configs, tarflow.common.files
print(tarflow.configs.FOLDER, tarflow.common.files.__file__)
"""
    bare = [sys.executable, "-I", "-S", "-c", code]  # without this installation's own hook
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    clone = tmp_path / "clone"
    assert done.stdout == f"{clone / 'configs'} {clone / 'common' / 'files.py'}\n", done.stderr[-3000:]


class TestConfigs:
    def test_listed_and_found(self, capsys: pytest.CaptureFixture) -> None:
        main(["configs"])
        names = capsys.readouterr().out.split()
        assert {"quickstart_text", "accelerate/fsdp2"} < set(names)
        for name in (names[0], "accelerate/ddp", "configs/accelerate/ddp.yaml"):
            main(["configs", name])
            assert Path(capsys.readouterr().out.strip()).is_file()
        with pytest.raises(SystemExit):
            main(["configs", "accelerate/dpp"])
        assert (
            capsys.readouterr().err == "error: unknown configuration 'accelerate/dpp'; did you mean accelerate/ddp?\n"
        )

    def test_paths_of_the_documentation_are_known_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shipped = str(configs.FOLDER / "decoder.yaml")
        assert configs.resolve("configs/decoder.yaml") == configs.resolve("decoder") == shipped
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs/decoder.yaml").touch()  # the user's own counts more
        assert configs.resolve("configs/decoder.yaml") == "configs/decoder.yaml"
        for name in ("configs/decodre.yaml", "other/decoder.yaml"):
            with pytest.raises(ValueError, match="there is no configuration"):
                configs.resolve(name)


def test_scripts_run_as_files_too() -> None:
    """As the documentation of a clone has them."""
    assert (ROOT / "scripts" / "__init__.py").is_file()
    spec = importlib.util.spec_from_file_location("file", ROOT / "scripts" / "train_vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
