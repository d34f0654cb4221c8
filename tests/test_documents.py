"""What the documents name is there: files, links, and pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"),  # which tells of earlier states
]
CODE = re.compile(r"`([\w/]+/[\w/]*\.(?:py|md|yaml))\b")
#: Files of a run, or of a user.
ELSEWHERE = {"lora/README.md"}
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)")


def headings(document: Path) -> set[str]:
    """Anchors of a document's headings."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_are_there(document: Path) -> None:
    named = {name for name in CODE.findall(document.read_text(encoding="utf-8")) if "NAME" not in name} - ELSEWHERE
    missing = sorted(name for name in named if not (ROOT / name).is_file())
    assert not missing, f"{document.name} names {', '.join(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        file = (document.parent / target).resolve()
        assert file.exists(), f"{document.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{document.name} links to {target}#{anchor}"


def test_there_is_something_to_check() -> None:
    found = [name for document in DOCUMENTS for name in CODE.findall(document.read_text(encoding="utf-8"))]
    assert len(found) > 80
