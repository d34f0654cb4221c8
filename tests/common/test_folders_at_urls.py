"""Folders on this machine and at URLs: the same names, files whole or not at all, errors in one sentence."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tarflow.common.folders import (
    LocalFolder,
    UrlFolder,
    check_folder_writable,
    hash_of_file,
    local_path,
    open_folder,
    scheme_of,
)


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> LocalFolder | UrlFolder:
    return open_folder(tmp_path / "x" if request.param == "local" else f"memory://{tmp_path.name}/x")


def test_files_are_whole_or_not_there(folder: Any, tmp_path: Path) -> None:
    assert folder.names() == []
    assert folder.read("a.bin") is None
    with folder.writing("a.bin") as path:
        path.write_bytes(b"12345")
    assert (folder.read("a.bin"), folder.size("a.bin"), folder.names()) == (b"12345", 5, ["a.bin"])
    with pytest.raises(KeyError), folder.writing("a.bin") as path:
        path.write_bytes(b"half")
        raise KeyError
    with folder.open("a.bin") as file:
        file.seek(1)
        assert file.read(2) == b"23"
    assert folder.read("a.bin") == b"12345"
    folder.fetch("a.bin", tmp_path / "copy")
    assert hash_of_file((tmp_path / "copy").open("rb")) == hash_of_file(io.BytesIO(b"12345"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "weights").write_bytes(b"1")
    folder.put_folder(source, "vae")
    assert sorted(folder.names()) == ["a.bin", "vae"]
    assert pickle.loads(pickle.dumps(folder)).read("vae/config.json") == b"{}"
    folder.remove("vae")
    folder.remove("a.bin")
    folder.remove("a.bin")
    assert folder.names() == []


def test_nothing_is_left_of_a_file_that_could_not_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = UrlFolder("memory://unsent")

    def full(self: Any, source: str, target: str, **options: Any) -> None:
        self.pipe_file(target, b"ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "put_file", full)
    with pytest.raises(OSError, match="No space left") as failed, folder.writing("a") as path:
        path.write_bytes(b"half")
    assert failed.value.filename == "memory://unsent/a"
    assert folder.names() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://bucket/x", "cannot open the URL 'foo://bucket/x': fsspec knows no scheme 'foo'"),
        ("s3://bucket/x", "needs the package s3fs, which is not installed: pip install s3fs"),
    ],
)
def test_schemes_that_cannot_be_opened(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", lacking)  # also where the package is installed
    for refuse in (open_folder, check_folder_writable):
        with pytest.raises(ValueError, match=message):
            refuse(url)


def test_paths_and_urls_are_told_apart(tmp_path: Path) -> None:
    assert [scheme_of(path) for path in ("a/b", "C:/a", "S3://a", tmp_path)] == [None, None, "s3", None]
    assert local_path(f"file://{tmp_path}") == tmp_path == open_folder(f"file://{tmp_path}").local
    assert local_path("memory://a") is None
    with pytest.raises(ValueError, match="is a file and no folder"):
        (tmp_path / "file").write_text("")
        check_folder_writable(f"file://{tmp_path}/file/x")
