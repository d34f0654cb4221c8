"""Small streams for tests: tar and parquet shards, of pictures whose colour is their number."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tarflow.data.config import DataConfig
from tarflow.data.stream.rows import Row
from tarflow.data.stream.stream import Stream
from tarflow.training.loop.streaming import Share, StreamReader


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture in one colour, which tells its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 90)).save(file, "PNG")
    return file.getvalue()


def tar_bytes(rows: Sequence[Mapping[str, bytes]], first: int = 0, folder: str = "x") -> bytes:
    """A tar file of rows, each with its files by ending."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, row in enumerate(rows, first):
            for ending, content in row.items():
                member = tarfile.TarInfo(f"{folder}/{number:05d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def row(number: int, size: tuple[int, int] = (8, 8), **more: Any) -> dict[str, bytes]:
    """A picture with a caption, a class and further columns."""
    return {
        "png": png(number, size),
        "txt": f"picture {number}, red, round".encode(),
        "cls": str(number % 2).encode(),
        "json": json.dumps({"number": number, **more}).encode(),
    }


def tar_shards(base: str, counts: Sequence[int], size: tuple[int, int] = (8, 8)) -> str:
    """Write tar files of so many rows each; returns the pattern of their URLs. Rows are numbered through."""
    first = 0
    for shard, count in enumerate(counts):
        rows = [row(number, size) for number in range(first, first + count)]
        write(f"{base}/{shard:03d}.tar", tar_bytes(rows, first))
        first += count
    return f"{base}/{{000..{len(counts) - 1:03d}}}.tar"


def parquet_shards(base: str, counts: Sequence[int], lacking: int = -1) -> str:
    """The same as parquet files with a column of pictures, ``text``, ``label`` and ``number``; one may lack ``text``."""
    first = 0
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        columns: dict[str, Any] = {"image": [{"bytes": png(number), "path": None} for number in numbers]}
        if shard != lacking:
            columns["text"] = [f"picture {number}" for number in numbers]
        columns |= {"label": [number % 2 for number in numbers], "number": list(numbers)}
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=5)
        write(f"{base}/{shard:03d}.parquet", file.getvalue())
        first += count
    return f"{base}/*.parquet"


def breaking_connections(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[float]]:
    """Two reads from `memory://` break. Returns how many are to come, and the seconds that were waited in between."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    plain, broken = io.BytesIO.read, [2]

    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 10_000 and broken[0]:
                broken[0] -= 1
                raise ConnectionResetError("connection reset")
            return plain(self, size)

    monkeypatch.setattr("tarflow.data.stream.urls.io.BytesIO", Breaking)
    return broken, waited


def config(path: str | None, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"source": "webdataset", "image_size": 8, "caption_column": "txt", "shuffle_buffer": 16}
    return DataConfig(**{**settings, "validation_fraction": 0.0, "path": path, **changes})


def table(files: str, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"source": "datasets", "streaming": True, "name": "parquet", "data_files": files}
    return config(None, **{"caption_column": "text", **settings, **changes})


def number_of(item: dict[str, Any]) -> int:
    """What `png` made a picture of."""
    return int(item["image"][0, 0, 0]) + 256 * int(item["image"][1, 0, 0])


def readers_of(
    stream: Stream,
    batch: int,
    processes: int,
    done: int = 0,
    state: Any = None,
    accumulation: int = 1,
    workers: int = 0,
) -> list[StreamReader]:
    """All processes' readers, in one process."""
    shares = [Share(batch, process, processes, accumulation) for process in range(processes)]
    return [StreamReader(stream, share, workers, done, state) for share in shares]


def items_of(stream: Stream) -> list[dict[str, Any]]:
    return [stream.readers[row.source].item(row) for row in stream.one_pass() if isinstance(row, Row)]


def first_error(settings: DataConfig, steps: int = 60) -> str:
    with pytest.raises(ValueError) as found:
        reader = readers_of(Stream(settings), 4, 1)[0]
        for _ in range(steps):
            next(reader)
    return str(found.value)
