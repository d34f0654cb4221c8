"""What data settings mean: splits, names in archives, classes by number, sizes, captions, and settings without effect."""

from __future__ import annotations

import errno
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fid_helpers import write_pictures
from stream_helpers import png, row, tar_bytes, write

from tarflow.data.captions import make_captions
from tarflow.data.config import DataConfig, MixedSource
from tarflow.data.folder import ImageFolder
from tarflow.data.images import nearest_size
from tarflow.data.named import NamedDataset
from tarflow.data.shard_store import ShardStore
from tarflow.data.stream.stream import Stream
from tarflow.pipeline.call.aspect import bucket_size, ratio_of


def sizes(path: Path, fraction: float) -> tuple[int, int]:
    config = DataConfig(source="folder", path=str(path), validation_fraction=fraction, image_size=8)
    train = ImageFolder(config, "train")
    return len(train), len(train.of_split("validation"))


def test_a_folder_for_training_alone_holds_some_out(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 40, size=(8, 8))
    train, held_out = sizes(tmp_path, 0.3)
    assert train + held_out == 40 and held_out > 4
    assert sizes(tmp_path, 0) == (40, 0)
    write_pictures(tmp_path / "validation", 3, seed=1, size=(8, 8))
    assert sizes(tmp_path, 0.3) == (40, 3)


def test_all_pictures_of_one_caption_are_in_one_split(tmp_path: Path) -> None:
    names = [path.name for path in write_pictures(tmp_path, 5, size=(8, 8)).iterdir()]
    lines = [json.dumps({"file_name": name, "text": "a cat"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"no images are left .* validation_fraction=0\.9, which holds out all pictures of a"
    ):
        sizes(tmp_path, 0.9)


def test_equal_lines_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (name,) = [path.name for path in write_pictures(tmp_path, 1, size=(8, 8)).iterdir()]
    lines = [json.dumps({"file_name": name, "text": text}) for text in ("a cat", "a dog", "a cat")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = ImageFolder(DataConfig(source="folder", path=str(tmp_path), validation_fraction=0), "train")
    assert [found.caption(index) for index in range(len(found))] == ["a cat", "a dog"]
    assert "1 line of metadata.jsonl said again what others say, and count once" in caplog.text


@pytest.mark.parametrize("name", ["Café", "日本", "Zürich"])
def test_names_in_archives_that_do_not_say_they_are_utf8(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for folder in (name, "Other"):
            archive.writestr(f"{folder}/1.png", png(3))
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = content.find(mark)
        while at >= 0:
            flags = int.from_bytes(content[at + place : at + place + 2], "little") & ~0x800
            content[at + place : at + place + 2] = flags.to_bytes(2, "little")
            at = content.find(mark, at + 4)
    path.write_bytes(content)
    found = ImageFolder(DataConfig(source="folder", path=str(path), validation_fraction=0), "train")
    assert set(found.class_names or ()) == {name, "Other"}
    assert found[0]["image"].size == (8, 8)


def test_classes_of_tar_files_by_a_dictionary_of_numbers() -> None:
    rows = [{**row(number), "cls": str([3, 7][number % 2]).encode()} for number in range(6)]
    write("memory://numbered.tar", tar_bytes(rows))
    config = DataConfig(
        source="webdataset",
        path="memory://numbered.tar",
        label_column="cls",
        class_names={"3": "dog", "7": "cat"},
        validation_fraction=0,
        image_size=8,
    )
    stream = Stream(config, "train", 0)
    assert stream.class_names == ("dog", "cat")
    assert sorted(stream[number]["label"] for number in range(6)) == [0, 0, 0, 1, 1, 1]


def test_a_pictures_size_is_the_same_in_caches_and_streams() -> None:
    names = ("16:9", "3:2", "1:1", "2:3", "9:16")
    found = [bucket_size(ratio_of(name), 64, 8) for name in names]
    assert nearest_size(found, 100, 100) == (64, 64)
    assert nearest_size(found, 100, 178) == found[0]
    # 72 × 100 is nearer to 2:3 by its name than by the size that is made of it.
    assert nearest_size([(80, 56), (72, 56)], 100, 72) == (80, 56)


def test_a_caption_needs_all_of_its_parts() -> None:
    config = DataConfig(source="folder", path="x", caption_template="{text}, {style} style")
    with pytest.raises(
        ValueError, match=r"the row of 'a\.png' has no value in the column 'style', which its caption needs"
    ):
        make_captions({"text": "cat", "style": None}, config, "a.png")


def test_further_captions_of_a_data_set_are_those_that_rows_have(tmp_path: Path) -> None:
    lines = [{"image": None, "text": f"cat {i}", "kw": "" if i % 2 else f"pet {i}"} for i in range(4)]
    names = [path.name for path in sorted(write_pictures(tmp_path, 4, size=(8, 8)).iterdir())]
    rows = [json.dumps({**line, "file_name": name}) for line, name in zip(lines, names, strict=True)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(row.replace('"image": null, ', "") for row in rows))
    config = DataConfig(
        source="datasets",
        name="imagefolder",
        data_files=str(tmp_path / "**"),
        validation_fraction=0,
        caption_template="{text}",
        more_caption_templates=["{kw}"],
        image_size=8,
    )
    data = NamedDataset(config, "train")
    assert sorted(data.caption(index) for index in range(len(data))) == [
        "cat 0",
        "cat 1",
        "cat 2",
        "cat 3",
        "pet 0",
        "pet 2",
    ]
    assert [data[index]["caption"] for index in range(len(data))] == [data.caption(i) for i in range(len(data))]
    folder = DataConfig(
        source="folder",
        path=str(tmp_path),
        validation_fraction=0,
        caption_template="{text}",
        more_caption_templates=["{kw}"],
        image_size=8,
    )
    assert len(ImageFolder(folder, "train")) == len(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"where": {"a": [1]}},
            "data.where is .* has no effect with 'drawings': leave it out, or give --data.where null",
        ),
        ({"class_names": ["a"]}, "data.class_names is"),
        ({"caption_template": "{text}"}, "data.caption_template is"),
        ({"split_folders": "only"}, "data.split_folders is 'only', .* or give --data.split_folders auto"),
        ({"source": "folder", "path": "x", "name": "y"}, "data.name is 'y', but it is for data.source 'datasets'"),
        ({"source": "folder", "path": "x", "train_split": "y"}, "data.train_split is 'y'"),
        ({"source": "folder", "path": "x", "image_column": "y"}, "data.image_column is 'y'"),
        ({"source": "webdataset", "path": "x.tar", "validation_split": "y"}, "tar files have no named splits"),
        ({"source": "datasets", "name": "x", "path": "y"}, "data.path is 'y'"),
        (
            {"source": "datasets", "name": "x", "streaming": True, "validation_path": "y"},
            "data.validation_path is 'y', but a data set's splits have names",
        ),
    ],
)
def test_settings_that_would_have_no_effect(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_caches_own_settings_may_stay_beside_it() -> None:
    own = {"where": {"a": [1]}, "caption_template": "{text}", "label_column": "y", "name": "z", "train_split": "t"}
    DataConfig(source="latents", path="x", **own)


def test_settings_of_some_parts_of_a_mix_are_for_those() -> None:
    mix = {"a": MixedSource(source="webdataset", path="x.tar"), "b": MixedSource(name="y")}
    config = DataConfig(source="datasets", streaming=True, mix=mix, train_split="t", validation_split="v")
    parts = {name: part for name, (_, part) in config.parts.items()}
    assert (parts["a"].train_split, parts["a"].validation_split) == ("train", None)
    assert (parts["b"].train_split, parts["b"].validation_split) == ("t", "v")


def test_a_full_disk_is_not_the_remote_places_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = ShardStore.__new__(ShardStore)
    store.path = tmp_path
    monkeypatch.setattr(ShardStore, "_is_here", lambda *_: False)
    monkeypatch.setattr(ShardStore, "_fetch", full)
    with pytest.raises(
        OSError, match=r"cannot be written to .*, No space left on device: make room there, set TARFLOW_CACHE"
    ):
        store.fetched({"file": "train-00000.safetensors"})
