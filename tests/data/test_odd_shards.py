"""Tar shards as people have them: odd names, odd files, few or empty shards, addresses with signatures."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stream_helpers import (
    config,
    first_error,
    items_of,
    number_of,
    parquet_shards,
    png,
    readers_of,
    row,
    table,
    tar_bytes,
    tar_shards,
    write,
)

from tarflow.benchmarks import data_sources
from tarflow.benchmarks.data_sources import http_server
from tarflow.data.stream.rows import Row
from tarflow.data.stream.stream import Stream
from tarflow.data.stream.urls import listed


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A tar file of files by name."""
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return found.getvalue()


def test_names_and_texts_as_people_have_them() -> None:
    """Capitals, folders, a byte order mark, lines and other scripts; what is no part of a row; a column like a file."""
    files = {
        "./a/b/0001.JPG": png(1),
        "./a/b/0001.TXT": b"\xef\xbb\xbfa red\r\nfish \n",
        "./a/b/0001.JSON": json.dumps(
            {"image": "0001.JPG", "txt": "none", "__key__": "k", "jpg": 1, "more": 2}
        ).encode(),
        "./a/c/0001.png": png(2),
        "./a/c/0001.txt": "ein grüner 🐟".encode(),
        "./a/c/._0001.png": b"of a system",
        "./README.md": b"read me",
        "./a/c/0002.json": b'{"txt": "three", "image": 3}',
        "./a/c/0002.webp": png(3),
        "./a/c/0002.mask.png": png(4),
    }
    write("memory://odd/names.tar", tar_of(files))
    settings = config("memory://odd/names.tar", class_names=["b", "c"], label_column="__folder__")
    found = {item["key"]: (number_of(item), item["caption"], item["label"]) for item in items_of(Stream(settings))}
    assert found == {
        "'a/b/0001' of the shard 'memory://odd/names.tar'": (1, "a red\r\nfish", 0),
        "'a/c/0001' of the shard 'memory://odd/names.tar'": (2, "ein grüner 🐟", 1),
        "'a/c/0002' of the shard 'memory://odd/names.tar'": (3, "three", 1),
    }
    found_error = first_error(replace(settings, caption_column="title"))
    assert re.match(
        r"'a/./000.' of the shard 'memory:.*' has no column 'title'; it has __folder__, __key__", found_error
    )
    named = replace(settings, where={"txt": ["three"]}, image_column="mask.png")
    assert [number_of(item) for item in items_of(Stream(named))] == [4]


def test_rows_that_run_together_are_refused() -> None:
    """Which a file name with further dots, or a file that is there twice, would lose without a word."""
    write("memory://odd/dots.tar", tar_of({f"photo.{number:04d}.jpg": png(number) for number in range(5)}))
    found = first_error(config("memory://odd/dots.tar", caption_column=None))
    assert found.startswith(
        "'photo' of the shard 'memory://odd/dots.tar': it has 5 pictures, 0000.jpg, 0001.jpg, 0002.jpg, …"
    )
    files = [("a.png", png(1)), ("a.txt", b"one"), ("b.png", png(2)), ("b.png", png(3)), ("b.txt", b"two")]
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    write("memory://odd/twice.tar", written.getvalue())
    settings = config("memory://odd/twice.tar")
    assert "it has two files of the ending 'png', the second 'b.png'" in first_error(settings)
    assert [number_of(item) for item in items_of(Stream(replace(settings, on_error="skip")))] == [1]


def test_a_shard_that_was_packed_by_endings() -> None:
    """All pictures first, then all captions: of each name there are two rows."""
    files = {f"{number}.png": png(number) for number in range(3)} | {f"{number}.txt": b"one" for number in range(3)}
    write("memory://odd/apart.tar", tar_of(files))
    found = first_error(config("memory://odd/apart.tar", caption_column=None))
    assert found.endswith("it has txt; files of one name must follow one another, as tar --sort=name packs them")


def test_half_a_character_in_a_caption_is_named() -> None:
    write("memory://odd/half.tar", tar_of({"1.png": png(1), "1.json": b'{"text": "cut \\ud83d"}'}))
    found = first_error(config("memory://odd/half.tar", caption_column="text"))
    assert "'1' of the shard 'memory://odd/half.tar'" in found and "has half of a character that takes two" in found


def test_links_and_joined_files_are_refused() -> None:
    """Of which a tar file that is read from its beginning to its end shows nothing."""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w") as archive:
            for name, content in (("a.png", png(1)), ("b.png", None), ("c.png", png(3))):
                member = tarfile.TarInfo(name)
                if content is None:
                    member.type, member.linkname = kind, "a.png"
                member.size = len(content or b"")
                archive.addfile(member, io.BytesIO(content or b""))
        write("memory://odd/links.tar", written.getvalue())
        settings = config("memory://odd/links.tar", caption_column=None)
        assert "'b' of the shard 'memory://odd/links.tar': the file 'b.png' is a link without" in first_error(settings)
        skipping = Stream(replace(settings, on_error="skip"))
        assert sorted(number_of(item) for item in items_of(skipping)) == [1, 3]
    write("memory://odd/joined.tar", tar_bytes([row(1)], 1) + bytes(10240) + tar_bytes([row(2)], 2))
    found = first_error(config("memory://odd/joined.tar"))
    assert found.startswith("the shard 'memory://odd/joined.tar' has more behind its end, as tar files joined by cat")
    write("memory://odd/padded.tar", tar_bytes([row(1)], 1) + bytes(1_000_000))
    assert [number_of(item) for item in items_of(Stream(config("memory://odd/padded.tar")))] == [1]


def test_a_shard_is_named_once() -> None:
    tar_shards("memory://odd/once", [2, 2, 2])
    for pattern in ("memory://odd/once/{000,001,000}.tar", "memory://odd/once/{000.tar,*}"):
        with pytest.raises(ValueError, match=r"names '/odd/once/000.tar' 2 times: name each file once"):
            listed(pattern)


def test_tables_are_named_as_tar_files_are() -> None:
    parquet_shards("memory://odd/tables", [3, 4, 5])
    for files in ("memory://odd/tables/{000..001}.parquet", {"train": ["memory://odd/tables/{000,001}.parquet"]}):
        stream = Stream(replace(table(""), data_files=files))
        assert sorted(number_of(item) for item in items_of(stream)) == list(range(7))
    with pytest.raises(ValueError, match=r"names 'memory://odd/tables/000.parquet' 2 times: name each file once"):
        Stream(table("memory://odd/tables/{000,001,000}.parquet"))


def test_shards_without_rows() -> None:
    """Empty ones among others, as filters leave them; all empty; no bytes at all."""
    tar_shards("memory://odd/empty", [0, 5, 0, 0, 4, 0])
    settings = config("memory://odd/empty/{000..005}.tar")
    numbers = Counter(number_of(item) for item in items_of(Stream(settings)))
    assert numbers == Counter(range(9))
    reader = readers_of(Stream(replace(settings, lanes=6)), 6, 1)[0]
    assert {int(image[0, 0, 0]) for _ in range(6) for image in next(reader)["image"]} <= set(range(9))
    nothing = Stream(config("memory://odd/empty/{000,002}.tar"))
    with pytest.raises(ValueError, match="has only 0 training rows, fewer than the 4 pictures of a step"):
        nothing.check_length(4)
    write("memory://odd/empty/none.tar", b"")
    assert "the shard 'memory://odd/empty/none.tar' is cut off or damaged" in first_error(
        config("memory://odd/empty/none.tar")
    )


def test_fewer_shards_than_processes_and_threads() -> None:
    stream = Stream(config(tar_shards("memory://odd/few", [12])), seed=1)
    readers = readers_of(stream, 2, 5, workers=3)
    seen: list[tuple[int, int]] = []
    lanes = readers[0].lanes
    for source in stream.sources(lanes):
        for lane in range(lanes):
            seen += [(row.shard, row.number) for row in source.first_pass(lane) if isinstance(row, Row)]
    assert sorted(seen) == [(0, number) for number in range(12)]
    assert {int(image[0, 0, 0]) for _ in range(4) for reader in readers for image in next(reader)["image"]} <= set(
        range(12)
    )
    for reader in readers:
        reader.close()


def test_an_address_with_a_signature(tmp_path: Path) -> None:
    """It is one file and no pattern; its ending is before the signature, which may be another one when a run goes on."""
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        rows = [row(number) for number in range(3 * shard, 3 * shard + 3)]
        (tmp_path / "shards" / f"{shard}.tar.gz").write_bytes(gzip.compress(tar_bytes(rows, 3 * shard)))
    with http_server(tmp_path / "shards", 0.0) as url:
        streams: list[Any] = [Stream(config(f"{url}/{{0..1}}.tar.gz?sign={sign}")) for sign in ("a/b.c", "d")]
        assert sorted(number_of(item) for item in items_of(streams[0])) == list(range(6))
    assert streams[0].identity == streams[1].identity
    assert streams[0].identity == Stream(config("memory://odd/{0..1}.tar.gz", on_error="skip")).identity


class Busy(data_sources.SlowHandler):
    """Answers its first requests by an error."""

    status, left = 503, multiprocessing.Value("i", 0)

    def send_head(self) -> Any:
        with self.left.get_lock():
            self.left.value -= 1
            if self.left.value >= 0:
                self.send_error(self.status)
                return None
        return super().send_head()


def test_a_web_server_that_is_busy_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever it answers when a file is opened fsspec says that the file is not there."""
    (tmp_path / "0.tar").write_bytes(tar_bytes([row(number) for number in range(3)]))
    monkeypatch.setattr(data_sources, "SlowHandler", Busy)
    monkeypatch.setattr("tarflow.data.stream.reading.WAITS", (0.01, 0.02, 0.03))
    with http_server(tmp_path, 0.0) as url:
        Busy.left.value = 4  # at the start, and when it is read
        assert sorted(number_of(item) for item in items_of(Stream(config(f"{url}/0.tar")))) == [0, 1, 2]
        assert Busy.left.value < 0
        stream = Stream(config(f"{url}/0.tar"))
        Busy.left.value = 100
        with pytest.raises(ValueError, match=r"cannot open '.*/0\.tar': 503"):
            items_of(stream)
        assert Busy.left.value < 100 - 6
    monkeypatch.setattr(Busy, "status", 403)
    with http_server(tmp_path, 0.0) as url:
        Busy.left.value = 100
        with pytest.raises(ValueError, match=r"cannot open '.*/0\.tar': 403"):
            items_of(Stream(config(f"{url}/0.tar")))
        assert Busy.left.value >= 100 - 4  # is not asked again
