"""Files of captions, conditions and measured rows: lines end at line feeds alone, and errors name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fid_helpers import write_pictures

from tarflow.evaluation.conditions import read_captions
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.reports.sweep import read_rows, write_rows
from tarflow.evaluation.samples.told import read_conditions

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_captions(tmp_path: Path, separator: str, mark: str, ending: str, kind: str) -> None:
    captions = ["a dog", f"a cat{separator}on a mat"]
    # Control characters must be escaped in JSON, those above 127 need not be.
    lines = [
        json.dumps({"text": text}, ensure_ascii=ord(separator) < 32) if kind == "jsonl" else text for text in captions
    ]
    path = tmp_path / f"captions.{kind}"
    path.write_bytes((mark + ending.join([*lines, ""])).encode())
    assert read_captions(str(path)) == captions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"line 2 of .*a\.jsonl.* is no UTF-8 text"),
        ("a.txt", b"caf\xe9\n", r"captions file .*a\.txt.* is no UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2 of .*a\.jsonl.* is no JSON object with a text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"line 2 of .*a\.jsonl.* has the text 3, expected a string"),
        ("a.jsonl", b'{"text": "a"}\n\n{"te\n', r"line 3 of .*a\.jsonl.* is no JSON"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(tmp_path / name))


@pytest.mark.parametrize("separator", SEPARATORS[:3])
def test_conditions(tmp_path: Path, separator: str) -> None:
    write_pictures(tmp_path, 2)
    captions = ["a dog", f"a cat{separator}on a mat"]
    rows = [json.dumps({"index": i, "caption": text}, ensure_ascii=False) for i, text in enumerate(captions)]
    (tmp_path / "conditions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert read_conditions(open_images(tmp_path), tmp_path) == ("caption", captions)
    (tmp_path / "conditions.jsonl").write_text("\n".join([rows[0], '{"index": [1]}']), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2 of .*conditions\.jsonl' is no JSON object with an index"):
        read_conditions(open_images(tmp_path), tmp_path)


def test_rows_of_sweeps(tmp_path: Path) -> None:
    fixed = {"seed": 0, "conditions": {}}
    rows = [{"settings": {"decoder": "vae", "num_inference_steps": None, "temperature": 0.5, "note": "a\u2028b"}}]
    write_rows(tmp_path, fixed, rows)
    assert read_rows(tmp_path, fixed) == rows
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "sweep.json"]
    for name in ("rows.jsonl", "sweep.json"):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_rows(tmp_path, fixed)
        (tmp_path / name).write_text(content)
