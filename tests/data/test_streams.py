"""Streams: which rows come when, that a run goes on with the same ones, and what is refused."""

from __future__ import annotations

import gc
import io
import json
import re
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fsspec.compression import compr
from stream_helpers import (
    breaking_connections,
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
from torch import Tensor
from trainings import train, weights

from tarflow.benchmarks.data_sources import http_server
from tarflow.data.config import MixedSource
from tarflow.data.folder import is_held_out
from tarflow.data.images import Images
from tarflow.data.place import check_data
from tarflow.data.stream.first import FirstPictures
from tarflow.data.stream.reading import Place, Source
from tarflow.data.stream.rows import Row, RowReader
from tarflow.data.stream.shards import PICTURE
from tarflow.data.stream.stream import Stream
from tarflow.data.stream.urls import expanded, listed
from tarflow.training.flow.arguments import parse_config
from tarflow.training.loop.streaming import Share, SizedBatches, StreamReader, plan_sizes

COUNTS = [20, 13, 30, 11]
FEW = [10, 7, 15, 6]
NAMES: list[str | int] = ["even", "odd"]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items tell the pass that they are of."""
    plain = RowReader.item
    monkeypatch.setattr(RowReader, "item", lambda self, row: {**plain(self, row), "turn": row.turn})


Seen = list[tuple[int, int]]


def steps(readers: list[StreamReader], number: int) -> Seen:
    """Pass and number of the pictures of some steps, in the order of the step's batch."""
    seen: Seen = []
    for _ in range(number):
        for _ in range(readers[0].share.accumulation):
            for reader in readers:
                batch = next(reader)
                numbers = [int(image[0, 0, 0]) for image in batch["image"]]
                seen += zip(batch["turn"], numbers, strict=True)
    return seen


def state_of(readers: list[StreamReader]) -> dict[str, Any]:
    """What a checkpoint keeps of all processes, through JSON."""
    places = {number: lane.state() for reader in readers for number, lane in reader._lanes.items()}
    state = {"identity": readers[0].stream.identity, "lanes": [places[number] for number in sorted(places)]}
    found: dict[str, Any] = json.loads(json.dumps(state))
    return found


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("lanes", [None, 3])
def test_going_on_sees_the_same_rows_or_each_once(kind: str, lanes: int | None) -> None:
    if kind == "tar":
        stream = Stream(config(tar_shards(f"memory://rows-{lanes}", FEW), lanes=lanes), seed=5)
    else:
        stream = Stream(table(parquet_shards(f"memory://rows-{lanes}", FEW), lanes=lanes), seed=5)
    first = readers_of(stream, 3, 2)
    begun = steps(first, 5)
    state = state_of(first)
    whole = steps(first, 15)
    assert steps(readers_of(stream, 3, 2, 5, state, workers=2), 15) == whole
    shares = {"one": (6, 1), "three": (2, 3)}
    other = {name: steps(readers_of(stream, *share, 5, state), 15) for name, share in shares.items()}
    other["passes"] = steps(readers_of(stream, 1, 2, 5, state, accumulation=3), 15)
    if lanes is None:  # the lanes are shared evenly: the same rows at the same places
        assert all(seen == whole for seen in other.values())
    for seen in other.values():
        counted = Counter(begun + seen)
        assert set(counted.values()) == {1}  # none twice in a pass
        first_pass = sorted(number for turn, number in counted if turn == 0)
        assert first_pass == list(range(sum(FEW)))  # and none lost


def test_few_shards_are_divided_and_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = Stream(config(tar_shards("memory://divided", [9, 14])))
    source = stream.sources(8)[0]
    rows = [row.number + 9 * row.shard for lane in range(8) for row in source.first_pass(lane) if isinstance(row, Row)]
    assert sorted(rows) == list(range(23))
    StreamReader(stream, Share(8, 0, 1, 1), 0, 0)
    assert "2 in all, are read 4 times in each pass, as there are 8 lanes" in caplog.text


def test_each_pass_has_an_order_of_its_own() -> None:
    stream = Stream(config(tar_shards("memory://orders", [8] * 6)), seed=1)
    source = stream.sources(2)[0]
    orders = [[unit for lane in range(2) for unit in source.order(turn, lane)] for turn in range(3)]
    assert all(sorted(order) == [(shard, 0) for shard in range(6)] for order in orders)
    assert orders[0] != orders[1] != orders[2]
    other = Stream(stream.config, seed=2).sources(2)[0]
    assert [source.order(turn, 0) for turn in range(3)] != [other.order(turn, 0) for turn in range(3)]
    rows = [row.number for row in islice(source.first_pass(0), 8) if isinstance(row, Row)]
    assert rows != sorted(rows)  # shuffled among each other


def test_streams_are_mixed_by_their_weights() -> None:
    few, many = tar_shards("memory://few", [10, 6]), tar_shards("memory://many", [50, 30])
    mix = {"few": MixedSource(path=few, weight=1), "many": MixedSource(path=many, weight=3)}
    stream = Stream(config(None, mix=mix))
    first = readers_of(stream, 4, 1)[0]
    keys = [key for _ in range(100) for key in next(first)["key"]]
    share = sum("few" in key for key in keys) / len(keys)
    assert 0.18 < share < 0.32
    state = state_of([first])
    expected = [next(first)["key"] for _ in range(10)]
    again = readers_of(stream, 4, 1, 100, state)[0]
    assert [next(again)["key"] for _ in range(10)] == expected


def test_rows_are_held_out_by_the_hash_of_a_column() -> None:
    path = tar_shards("memory://held", COUNTS)
    for column in ("number", "__key__"):
        settings = config(path, key_column=None if column == "__key__" else column, validation_fraction=0.3)
        train_rows = {number_of(stream_item) for stream_item in items_of(Stream(settings))}
        held_out = FirstPictures(Stream(settings, "validation"), 1000)
        numbers = {number_of(held_out[index]) for index in range(len(held_out))}
        keys = {number: f"x/{number:05d}" if column == "__key__" else str(number) for number in range(sum(COUNTS))}
        assert numbers == {number for number, key in keys.items() if is_held_out(key, 0.3)}
        assert train_rows == set(keys) - numbers
        assert len(FirstPictures(Stream(settings, "validation"), 5)) == 5
        assert all(held_out.caption(i) == f"picture {number_of(held_out[i])}, red, round" for i in range(len(held_out)))
    apart = config(path, validation_path=tar_shards("memory://apart", [4]), validation_fraction=0.3)
    assert len(items_of(Stream(apart))) == sum(COUNTS)
    assert len(FirstPictures(Stream(apart, "validation"), 1000)) == 4
    assert len(FirstPictures(Stream(config(path), "validation"), 1000)) == 0


def test_first_pictures_are_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a training shuffles among each other."""
    settings = config(tar_shards("memory://further", [30, 30]), lanes=2, validation_fraction=0.2, shuffle_buffer=40)
    read: list[int] = []
    plain = RowReader.wanted
    monkeypatch.setattr(RowReader, "wanted", lambda self, row: [read.append(row.number), plain(self, row)][1])
    for split in ("train", "validation"):
        pictures = FirstPictures(Stream(settings, split), 4)
        numbers = [number_of(pictures[index]) % 30 for index in range(4)]
        assert max(read) == max(numbers) < 29
        read.clear()
    assert len(FirstPictures(Stream(settings, "validation"), 0)) == 0
    assert read == []


def test_filters_templates_and_labels_are_as_for_folders() -> None:
    rows = [row(number, style="noto" if number % 3 else "flat", folder=None) for number in range(12)]
    write("memory://like/a.tar", tar_bytes(rows, folder="n02"))
    write("memory://like/b.tar", tar_bytes(rows, folder="n01"))
    names: dict[str, str | int] = {"n01": "first", "n02": "second"}
    settings = config(
        "memory://like/{a,b}.tar",
        where={"style": ["noto"]},
        caption_template="{txt}, {style} style",
        label_column="__folder__",
        class_names=names,
    )
    stream = Stream(settings)
    items = items_of(stream)
    assert stream.class_names == ("first", "second")
    assert sorted(number_of(item) for item in items) == sorted([number for number in range(12) if number % 3] * 2)
    assert {item["caption"] for item in items} >= {"picture 1, red, round, noto style"}
    assert all(item["label"] == ("n02" in item["key"].split("/")[0]) for item in items)
    numbered = Stream(config("memory://like/{a,b}.tar", label_column="cls", class_names=NAMES))
    assert all(item["label"] == number_of(item) % 2 for item in items_of(numbered))


def test_a_row_has_another_caption_in_each_pass() -> None:
    rows = [row(number, captions=["one", "two", "three"], style="flat" if number else "") for number in range(40)]
    write("memory://ways/a.tar", tar_bytes(rows))
    ways = {"more_caption_templates": ["{style} picture"], "caption_template": "{captions}, red, round"}
    settings = config("memory://ways/a.tar", **ways, caption_weights=[3, 1], choose_from_lists=True)
    reader = Stream(settings).readers[0]

    source = Stream(settings).sources(1, shuffled=False)[0]
    known = [row for row in source.first_pass(0) if isinstance(row, Row)]

    def captions(reader: RowReader, turn: int) -> list[str]:
        return [reader.caption(replace(row, turn=turn)) for row in known]

    everything = Counter(caption for turn in range(20) for caption in captions(reader, turn))
    assert set(everything) == {"one, red, round", "two, red, round", "three, red, round", "flat picture"}
    assert 0.2 < everything["flat picture"] / everything.total() < 0.3
    assert captions(reader, 3) == captions(reader, 3) != captions(reader, 4)
    assert " picture" not in {captions(reader, turn)[0] for turn in range(20)}  # its style is empty
    held_out = RowReader(settings, "validation", Stream(settings).shards[0], 0, [(8, 8)])
    assert set(captions(held_out, 0)) == {"one, red, round"}
    dropping = Stream(config("memory://ways/a.tar", drop_caption_parts=0.5)).readers[0]
    parts = [caption.split(", ") for turn in range(20) for caption in captions(dropping, turn)]
    assert all(found[0].startswith("picture ") for found in parts)
    assert 0.45 < sum("red" in found for found in parts) / len(parts) < 0.55


def test_a_data_set_of_the_hub_is_streamed_with_its_own_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["even", "odd"]),
            "title": datasets.Value("string"),
        }
    )

    def rows(shards: list[int]) -> Iterator[dict[str, Any]]:
        for number in (shard * 10 + place for shard in shards for place in range(10)):
            (tmp_path / f"{number}.png").write_bytes(png(number))
            content = (
                {"bytes": png(number), "path": None}
                if number % 2
                else {"bytes": None, "path": str(tmp_path / f"{number}.png")}
            )
            yield {"picture": content, "kind": number % 2, "title": f"number {number}"}

    def load(name: str, split: str, streaming: bool, **options: Any) -> datasets.IterableDataset:
        assert (name, split, streaming) == ("owner/name", "train", True)
        return datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"shards": [0, 1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = {"image_column": "picture", "label_column": "kind", "caption_column": "title"}
    stream = Stream(table("", name="owner/name", data_files=None, class_names=["a", "b"], **columns))
    assert stream.class_names == ("a", "b")
    items = items_of(stream)
    assert sorted(number_of(item) for item in items) == list(range(40))
    assert all(item["label"] == number_of(item) % 2 for item in items)
    assert all(item["caption"] == f"number {number_of(item)}" for item in items)
    with pytest.raises(
        ValueError, match=r"data.label_column is 'class', but 'owner/name' has the columns picture, kind"
    ):
        Stream(table("", name="owner/name", data_files=None, **{**columns, "label_column": "class"}))


class MadeUp:
    """A hundred shards of a million rows, made as they are asked for."""

    def __init__(self) -> None:
        self.names = [f"shard {number}" for number in range(100)]
        self.classes = None

    def rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        for number in islice(count(start), 1_000_000 - start):
            yield {PICTURE: b"", "txt": f"picture {number} of {shard}"}


def test_a_hundred_million_rows_add_nothing_to_memory() -> None:
    settings = config("nowhere")
    reader = RowReader(settings, "train", MadeUp(), 0, [(8, 8)])
    source = Source(0, MadeUp(), reader, 0, 4, 64, False)

    def peak(place: Place, number: int) -> int:
        gc.collect()
        tracemalloc.start()
        rows = sum(len(rows) for _, rows in islice(source.blocks(1, place), number // 64))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows > number - 64
        return found

    peak(Place(), 128)
    few, many = peak(Place(), 1_000), peak(Place(), 6_000)
    last = peak(Place(0, 24, 999_000), 1_000)  # at the end of the lane's 25 million rows
    assert many < few + 20_000
    assert last < few + 20_000


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_training_that_goes_on_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        data = ["--data.source", "webdataset", "--data.path", tar_shards("memory://train", COUNTS, (32, 32))]
        data += ["--data.label_column", "cls"]
    else:
        files = parquet_shards((tmp_path / "data").as_uri(), COUNTS)
        data = ["--data.source", "datasets", "--data.streaming", "true", "--data.name", "parquet"]
        data += ["--data.data_files", files, "--data.label_column", "label"]
    data += [
        "--data.class_names",
        '["even", "odd"]',
        "--data.validation_fraction",
        "0.2",
        "--data.shuffle_buffer",
        "16",
        "--train.steps",
        "6",
    ]
    _, metrics = train(tmp_path / "whole", *data, "--log.checkpoint_every", "4", "--train.num_workers", "2")
    resume = ["--resume", str(tmp_path / "whole" / "checkpoints" / "step_00000004")]
    with pytest.raises(ValueError, match="the checkpoint is of another stream"):
        train(tmp_path / "again", *data, *resume, "--data.shuffle_buffer", "8")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="was trained on a stream, but the data here is pictures by number"):
        train(tmp_path / "again", *resume)
    trainer, again = train(tmp_path / "again", *data, *resume)
    assert trainer.step == 6
    assert again == metrics
    stream = trainer.task.train  # which keeps neither files open nor rows that were read ahead for the start
    assert isinstance(stream, Stream)
    assert stream._pass is None
    assert number_of(stream[40]) in range(sum(COUNTS))
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_training_over_http_is_that_from_the_folder(tmp_path: Path) -> None:
    """By requests, where aiohttp is not installed; with shards by a star, and one that is not there."""
    (tmp_path / "shards").mkdir()
    tar_shards(str(tmp_path / "shards"), FEW, (32, 32))
    data = ["--data.source", "webdataset", "--data.validation_fraction", "0.2", "--data.shuffle_buffer", "16"]
    data += ["--data.label_column", "cls", "--data.class_names", '["even", "odd"]', "--train.steps", "3", "--data.path"]
    found = []
    with http_server(tmp_path / "shards", 0.0) as url:
        for name, place in (("http", url), ("folder", str(tmp_path / "shards"))):
            found.append((train(tmp_path / name, *data, f"{place}/*.tar")[1], weights(tmp_path / name)))
        with pytest.raises(ValueError, match=r"cannot open 'http://.*/007\.tar': there is no such file"):
            Stream(config(f"{url}/007.tar")).check_length(1)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], value) for key, value in found[1][1].items())


def test_a_checkpoint_of_another_stream_is_refused() -> None:
    settings = config(tar_shards("memory://others", [9, 9]))
    state = state_of(readers_of(Stream(settings), 4, 1))
    for changes in ({"shuffle_buffer": 8}, {"where": {"number": [1]}}, {"path": "memory://others/000.tar"}):
        other = Stream(replace(settings, **changes))
        with pytest.raises(ValueError, match="the checkpoint is of another stream"):
            readers_of(other, 4, 1, 0, state)
    assert "sizes" in readers_of(Stream(settings), 4, 1)[0].state()
    moved = tar_shards("memory://others/elsewhere", [9, 9])
    readers_of(Stream(replace(settings, path=moved)), 4, 1, 0, state)  # the same shards in another folder
    with pytest.raises(ValueError, match=r"the checkpoint has 4 lanes, but data.lanes is 3"):
        readers_of(Stream(replace(settings, lanes=3)), 4, 1, 0, state)
    with pytest.raises(
        ValueError, match=r"the checkpoint has 4 lanes, fewer than the 5 processes: go on with at most 4"
    ):
        readers_of(Stream(settings), 4, 5, 0, state)


def test_pictures_of_several_sizes_come_in_batches_of_one(tmp_path: Path) -> None:
    shapes = [(8, 8), (16, 8), (8, 16)]
    for shard in range(4):
        rows = [row(number, shapes[number * 7 % 10 % 3]) for number in range(shard * 20, shard * 20 + 20)]
        write(f"memory://sizes/{shard}.tar", tar_bytes(rows, shard * 20))
    stream = Stream(config("memory://sizes/{0..3}.tar")).with_sizes([(8, 8), (6, 12), (12, 6)])
    first = StreamReader(stream, Share(2, 0, 1, 2), 0, 0)
    begun: list[Tensor] = [next(first)["image"] for _ in range(12)]
    assert len({tuple(images.shape[2:]) for images in begun}) == 3
    for one, two in zip(begun[::2], begun[1::2], strict=True):  # the passes of a step
        assert one.shape == two.shape
    state, folder = state_of([first]), tmp_path
    first.write_waiting(folder)
    waiting = [torch.load(folder / "stream_0.pt", weights_only=True)]
    whole = [next(first)["image"] for _ in range(20)]
    again = StreamReader(stream, Share(2, 0, 1, 2), 2, 6, state, waiting)
    assert all(torch.equal(next(again)["image"], images) for images in whole)
    for told in ({**state, "sizes": [list(size) for size in stream.sizes]}, state):  # earlier checkpoints tell no sizes
        for sizes in ([(8, 8), (6, 12)], [(8, 8)]):
            with pytest.raises(
                ValueError, match=r"the checkpoint has pictures of .*12 × 6.* but data.aspect_ratios .* give"
            ):
                StreamReader(stream.with_sizes(sizes), Share(2, 0, 1, 2), 0, 6, told, waiting)
    # What waited is dealt out to other processes, none of it twice.
    dealt = [SizedBatches(stream, Share(2, process, 3, 1), waiting).items for process in range(3)]
    keys = [item["key"] for items in dealt for item in items]
    assert sorted(keys) == sorted(item["key"] for item in waiting[0]["items"])


def test_no_size_gathers_pictures_without_end() -> None:
    assert plan_sizes([9, 4, 2], 4) == [0, 0, 1]
    assert plan_sizes([1, 2, 0], 4) == [1]
    stream = Stream(config(tar_shards("memory://long", [40]))).with_sizes([(8, 8), (4, 16), (16, 4)])
    batches = SizedBatches(stream, Share(4, 0, 1, 1), [])
    generator = torch.Generator().manual_seed(0)

    def read() -> list[dict[str, Any]]:
        sizes = torch.multinomial(torch.tensor([0.9, 0.08, 0.02]), 4, True, generator=generator)
        return [{"image": torch.zeros(1, *stream.sizes[int(size)])} for size in sizes]

    most = 0
    for step in range(400):
        items = batches.next(step, read)
        assert len({tuple(item["image"].shape) for item in items}) == 1
        most = max(most, len(batches.items))
    assert most <= 24


def test_what_cannot_be_read_is_named_or_skipped_and_counted() -> None:
    path = tar_shards("memory://bad", [9, 9, 9])
    with io.BytesIO(tar_bytes([row(number) for number in range(18, 27)], 18)) as whole:
        write("memory://bad/002.tar", whole.getvalue()[:20_000])
    found = first_error(config(path))
    assert "the shard 'memory://bad/002.tar' is cut off" in found
    files = parquet_shards("memory://bad", [9, 9, 9])
    with fsspec.open("memory://bad/001.parquet") as file:
        content = file.read()
    write("memory://bad/001.parquet", content[:-200])
    assert "the shard 'memory:///bad/001.parquet' cannot be read to its end" in first_error(table(files))
    rows: list[dict[str, bytes]] = [row(number) for number in range(9)]
    rows[4]["png"] = b"no picture"
    write("memory://bad/000.tar", tar_bytes(rows))
    settings = config("memory://bad/{000,001}.tar")
    assert first_error(settings) == (
        "cannot read the image 'x/00004' of the shard 'memory://bad/000.tar': it is no picture of a known format"
    )
    skipping = config("memory://bad/{000..002}.tar", on_error="skip")
    reader = readers_of(Stream(skipping), 4, 1)[0]
    messages: set[str] = set()
    numbers: set[int] = set()
    for _ in range(20):
        batch = next(reader)
        messages.update(batch["skipped"])
        numbers |= {int(image[0, 0, 0]) for image in batch["image"]}
    assert len(messages) == 2
    assert 4 not in numbers
    assert {3, 5, 17, 18} <= numbers


def test_a_row_that_cannot_be_read_costs_no_other() -> None:
    rows: list[dict[str, bytes]] = [row(number) for number in range(9)]
    rows[4]["json"] = b'{"number": '
    rows[6]["txt"] = b"\xff"
    write("memory://rows/broken.tar", tar_bytes(rows))
    pictures: list[dict[str, Any]] = [{"bytes": png(number), "path": None} for number in range(9)]
    pictures[4] = pictures[6] = {"bytes": None, "path": "memory://rows/none.png"}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, "text": [f"picture {n}" for n in range(9)]}), file)
    write("memory://rows/broken.parquet", file.getvalue())
    tar, parquet = config("memory://rows/broken.tar"), table("memory://rows/broken.parquet")
    found = r"'x/0000[46]' of the shard 'memory://rows/broken.tar': the file 'x/0000[46]\.(json|txt)' cannot be read"
    assert re.match(found, first_error(tar))
    found = (
        "row [46] of the shard 'memory:///rows/broken.parquet': cannot open 'memory://rows/none.png': there is no such"
    )
    assert re.match(found, first_error(parquet))
    for settings in (tar, parquet):
        source = Stream(replace(settings, on_error="skip")).sources(1, shuffled=False)[0]
        found = list(source.first_pass(0))
        assert [one.number for one in found if isinstance(one, Row)] == [0, 1, 2, 3, 5, 7, 8]
        assert len([one for one in found if isinstance(one, str)]) == 2


def test_first_captions_leave_out_what_cannot_be_read() -> None:
    rows: list[dict[str, bytes]] = [row(number) for number in range(6)]
    del rows[2]["txt"]
    write("memory://captions/0.tar", tar_bytes(rows))
    stream = Stream(config("memory://captions/0.tar", on_error="skip"))
    assert {stream.caption(index) for index in range(6)} == {f"picture {n}, red, round" for n in (0, 1, 3, 4, 5)}
    with pytest.raises(ValueError, match=r"'x/00002' of the shard .* has no column 'txt'"):
        [Stream(config("memory://captions/0.tar")).caption(index) for index in range(6)]


@pytest.mark.parametrize("used", [True, False])
def test_no_thread_outlives_a_reader(used: bool) -> None:
    before = set(threading.enumerate())
    with StreamReader(Stream(config(tar_shards("memory://ended", COUNTS))), Share(4, 0, 1, 1), 2, 0) as reader:
        if used:
            next(reader)
        assert len(set(threading.enumerate()) - before) >= 4  # one reads ahead in each lane
    assert not [thread for thread in set(threading.enumerate()) - before if thread.daemon]


def test_a_connection_that_breaks_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_shards("memory://broken", [9])
    broken, waited = breaking_connections(monkeypatch)
    stream = Stream(config(path))
    source = stream.sources(1, shuffled=False)[0]
    numbers = [row.number for row in source.first_pass(0) if isinstance(row, Row)]
    assert numbers == list(range(9))  # each once
    assert len(waited) == 2
    broken[0] = 100
    with pytest.raises(ValueError, match=r"the shard 'memory://broken/000.tar' cannot be read on: connection reset"):
        list(source.first_pass(0))


def test_a_column_that_a_later_shard_lacks_is_named() -> None:
    files = parquet_shards("memory://lacking", [5, 5, 5], lacking=2)
    found = first_error(table(files))
    assert "of the shard 'memory:///lacking/002.parquet'" in found
    assert "has no value in the column 'text'" in found
    tar = tar_shards("memory://lacking", [5, 5])
    rows = [{name: content for name, content in row(number).items() if name != "txt"} for number in range(5)]
    write("memory://lacking/002.tar", tar_bytes(rows))
    found = first_error(config(tar.replace("001", "002")))
    assert "of the shard 'memory://lacking/002.tar'" in found
    assert "has no column 'txt'" in found


def test_classes_must_be_known_from_the_beginning() -> None:
    path = tar_shards("memory://late", [9])
    with pytest.raises(ValueError, match=r"a stream does not tell its classes.*name them all by data.class_names"):
        Stream(config(path, label_column="cls"))
    write("memory://late/001.tar", tar_bytes([{**row(number), "cls": b"7"} for number in range(9)]))
    found = first_error(config("memory://late/{000,001}.tar", label_column="cls", class_names=NAMES))
    assert "of the shard 'memory://late/001.tar' has the label 7 in the column 'cls'" in found
    assert "none of the 2 classes (even, odd)" in found


def lacking(scheme: str) -> None:
    """Stands for fsspec where a package is missing."""
    raise ImportError(f"Install what reads {scheme}")


def test_wrong_places_and_settings_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ({"train": "s3://bucket/*.parquet"}, {"train": ["a.parquet", "s3://bucket/b.parquet"]})
    with monkeypatch.context() as patch:  # also where the package is installed
        patch.setattr("fsspec.get_filesystem_class", lacking)
        for settings in (config("s3://bucket/{00..99}.tar"), *(replace(table(""), data_files=one) for one in files)):
            with pytest.raises(ValueError, match="needs the package s3fs, which is not installed: pip install s3fs"):
                check_data(settings)
    with pytest.raises(ValueError, match="fsspec knows no scheme 'nowhere'"):
        check_data(config("nowhere://bucket/0.tar"))
    with pytest.raises(ValueError, match=r"cannot open '.*7.tar': there is no such file"):
        first = Stream(config(f"{tmp_path}/{{7..8}}.tar"))
        first.check_length(1)
    (tmp_path / "7.tar.zst").touch()
    with pytest.raises(ValueError, match=r"cannot open '.*7.tar.zst': it needs the package zstandard, which is not"):
        monkeypatch.delitem(compr, "zstd", raising=False)
        Stream(config(f"{tmp_path}/7.tar.zst")).check_length(1)
    with pytest.raises(
        ValueError, match=r"cannot open '.*': it is a folder: name the files in it, such as FOLDER/\*\.tar"
    ):
        Stream(config(str(tmp_path))).check_length(1)
    with pytest.raises(ValueError, match="no file fits"):
        Stream(config(f"{tmp_path}/*.tar"))
    short = Stream(config(tar_shards("memory://short", [5])))
    with pytest.raises(ValueError, match="has only 5 training rows, fewer than the 8 pictures of a step"):
        short.check_length(8)
    with pytest.raises(ValueError, match=r"data.lanes is 1, fewer than the 2 processes: raise it, or leave it out"):
        readers_of(Stream(config(tar_shards("memory://short", [5]), lanes=1)), 4, 2)
    with pytest.raises(ValueError, match="no rows are left in the stream"):
        Stream(config(tar_shards("memory://short", [5]), where={"number": [99]}))[0]
    with pytest.raises(ValueError, match=r"data.aspect_ratios is for streams"):
        parse_config(["--data.aspect_ratios", '["1:1"]', "--flow", "{}", "--output", "none"])
    with pytest.raises(ValueError, match=r"data.streaming is for data.source 'datasets'"):
        parse_config(["--data.streaming", "true", "--flow", "{}", "--output", "none"])
    with pytest.raises(ValueError, match="caption_weights has 3 numbers, but there are 1 ways"):
        config("a.tar", caption_weights=[1, 2, 3])
    with pytest.raises(ValueError, match="the data is a stream, of which only the next pictures are known"):
        Images(config("a.tar"))
    with pytest.raises(ValueError, match="cannot stream the data set 'parquet'"):
        Stream(table(f"{tmp_path}/none.parquet"))


def test_patterns_and_tar_names(tmp_path: Path) -> None:
    assert expanded("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expanded("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for number in (2, 1):
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes([{"png": png(1)}]))
    assert listed(f"{tmp_path}/*.tar") == [str(tmp_path / "1.tar"), str(tmp_path / "2.tar")]
    assert listed(f"{tmp_path.as_uri()}/*.tar") == [f"{tmp_path.as_uri()}/{number}.tar" for number in (1, 2)]
