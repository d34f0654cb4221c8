"""What the documents name is there: files, links, and pictures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

from tarflow import configs, models
from tarflow.cli import demo, generate, likelihood
from tarflow.cli.main import COMMANDS
from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.training.flow.arguments import parse_config

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"),  # which tells of earlier states
]
CODE = re.compile(r"`([\w/]+/[\w/]*\.(?:py|md|yaml))\b")
#: Files of a run, or of a user.
ELSEWHERE = {"lora/README.md"}
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


def headings(document: Path) -> set[str]:
    """Anchors of a document's headings."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_are_there(document: Path) -> None:
    named = {name for name in CODE.findall(document.read_text(encoding="utf-8")) if "NAME" not in name} - ELSEWHERE
    missing = sorted(name for name in named if not (ROOT / name).is_file())
    assert not missing, f"{document.name} names {', '.join(missing)}"


LINKED = [*DOCUMENTS, ROOT / "docs/LOG.md", *sorted((ROOT / "models").rglob("README.md"))]


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{document.name} links to {target}#{anchor}"


def test_the_readme_says_what_each_configuration_and_pipeline_is_for() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*configs.shipped(), *models.shipped()):
        assert f"`{name}`" in text, name


def commands() -> list[tuple[str, list[str]]]:
    """Commands `tarflow …` of the README and docs/commands.md, whole, and their arguments."""
    found = []
    for document in (ROOT / "README.md", ROOT / "docs/commands.md"):
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["tarflow"]:
                    found.append((" ".join(line.split()), words[1:]))
    return found


@pytest.mark.parametrize("arguments", [pytest.param(words, id=line) for line, words in commands()])
def test_commands_are_understood(arguments: list[str]) -> None:
    command, *rest = arguments
    if command == "generate":
        generate.check(generate.parser().parse_intermixed_args(rest))
    elif command == "demo":
        demo.parser().parse_args(rest)
    elif command == "train":
        parse_config(with_config_file(rest), None, "tarflow train")
    elif arguments[:2] == ["evaluate", "likelihood"]:
        parse_dataclass(likelihood.LikelihoodConfig, rest[1:], None, "tarflow evaluate likelihood")
    else:
        assert command in COMMANDS or command == "--help"


def test_there_is_something_to_check() -> None:
    found = [name for document in DOCUMENTS for name in CODE.findall(document.read_text(encoding="utf-8"))]
    assert len(found) > 80 and len(commands()) > 10
