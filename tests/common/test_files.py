"""Files written whole or not at all, and files of one JSON object a line."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from tarflow.common.charts import markdown_table
from tarflow.common.files import (
    check_writable,
    is_special,
    json_lines,
    read_json_lines,
    replaced,
    write_json,
    write_picture,
    write_text,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two\r\n")
    assert path.read_bytes() == b"two\r\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_after_an_error_the_file_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), replaced(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "ours", "")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "usual").st_mode


def test_files_that_a_writer_makes_for_its_owner_alone_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    (tmp_path / "group").write_text("")
    (tmp_path / "group").chmod(0o640)
    for name, mode in (("new", (tmp_path / "usual").stat().st_mode), ("group", 0o640)):
        with replaced(tmp_path / name) as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == stat.S_IMODE(mode)


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": "ß", "b": [1, 2]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": "ß", "b": [1, 2]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("nan"))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["b"] == [1, 2]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\u0085", "\x1c", "é"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path, inside: str, mark: bytes) -> None:
    rows = [{"text": f"a{inside}b" if inside != "\x1c" else "ab"}, {"text": "c"}]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mark + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_json_lines(path) == [(1, rows[0]), (3, rows[1])]


def test_errors_name_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"line 2 of rows\.jsonl is no JSON"):
        json_lines('{"a": 1}\n{', "rows.jsonl")
    with pytest.raises(ValueError, match=r"line 2 of rows\.jsonl is no UTF-8"):
        json_lines('"a"\n"é"'.encode("latin-1"), "rows.jsonl")


def test_errors_of_writing_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.json"):
        write_json(tmp_path / "x.json", 1)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_json(tmp_path / "file" / "x.json", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder'$"):
        write_json(tmp_path / "folder", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_devices_and_pipes_are_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(tmp_path / "pipe")
        write_text(tmp_path / "pipe", "through")
        assert os.read(reading, 100) == b"through"
    finally:
        os.close(reading)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no disk in memory")
def test_files_in_memory_are_files() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "x.json"
        path.write_text("before")
        assert not is_special(path)
        with pytest.raises(KeyboardInterrupt), replaced(path) as temporary:
            assert temporary.parent == path.parent  # to be renamed
            raise KeyboardInterrupt
        assert path.read_text() == "before"


def test_standard_streams_are_no_files() -> None:
    assert is_special(Path("/dev/null"))
    for name in ("stdout", "fd/1"):
        assert is_special(Path("/dev") / name) or not (Path("/dev") / name).exists()


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    check_writable("~/new/x")
    write_text("~/new/x", "at home")
    assert (tmp_path / "new" / "x").read_text() == "at home"


def test_places_are_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "er" / "x.json")
    check_writable(tmp_path / "new", folder=True)
    monkeypatch.chdir(tmp_path)
    check_writable("x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is made
    for path, folder, message in (
        ("", False, "is empty"),
        (tmp_path, False, "it is a folder"),
        (tmp_path / "file", True, "is a file and no folder"),
        (tmp_path / "file" / "x", False, "is a file and no folder"),
        (tmp_path / ("x" * 300), False, "File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            check_writable(path, folder)

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ValueError, match=r"cannot write 'new/x\.json': Read-only file system"):
        check_writable("new/x.json")


def test_numbers_that_json_lacks_become_null_where_that_is_asked_for(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1.0, float("nan")], "b": (float("inf"), "é")}, nan_as_null=True)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None], "b": [None, "é"]}


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    write_picture(tmp_path / "new" / "x.png", Image.new("RGB", (3, 2), "red"), optimize=True)
    assert Image.open(tmp_path / "new" / "x.png").size == (3, 2)
    with pytest.raises(OSError):
        write_picture(tmp_path / "new" / "x.jpg", Image.new("RGBA", (3, 2)), "JPEG")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.png"]


def test_tables_of_markdown() -> None:
    rows = [["one", 1.23456, None], [2, 1e-5, "x"]]
    assert markdown_table(["a", "b", "c"], rows).splitlines() == [
        *("| a | b | c |", "| --- | --- | --- |", "| one | 1.235 | – |", "| 2 | 1e-05 | x |")
    ]
