"""Caches of streams: each row once, the same bytes on any number of processes, and gone on with after they were killed."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from autoencoders import save_autoencoder
from latent_caches import run_two
from stream_helpers import breaking_connections, parquet_shards, row, tar_bytes, tar_shards, write
from transformers import T5EncoderModel

from tarflow.data.config import DataConfig, MixedSource
from tarflow.data.images import to_model
from tarflow.data.latents import CachedLatents
from tarflow.data.stream.stream import Stream
from tarflow.pipeline.text.encoding import encode_captions
from tarflow.training.flow.config import TextConfig, VaeConfig
from tarflow.training.flow.text import small_t5, train_tokenizer
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.vae.codec import LatentCodec, load_autoencoder, weights_hash

COUNTS = [9, 4, 7, 5]


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def cache_config(output: Path | str, vae_path: str, pattern: str, **changes: Any) -> CacheConfig:
    data: dict[str, Any] = {"source": "webdataset", "path": pattern, "caption_column": "txt", "image_size": 8}
    data |= {"label_column": "cls", "class_names": ["even", "odd"], "validation_fraction": 0.3}
    options: dict[str, Any] = {"vae": VaeConfig(name=vae_path), "shard_size": 4, "batch_size": 3, "dtype": "float32"}
    data |= changes.pop("data", {})
    return CacheConfig(output=str(output), data=DataConfig(**data), **{**options, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def captions(path: Path | str) -> tuple[list[str], list[str]]:
    splits = (CachedLatents(path, split) for split in ("train", "validation"))
    first, second = ([str(split.caption(index)) for index in range(len(split))] for split in splits)
    return first, second


def test_each_row_is_cached_once(tmp_path: Path, vae_path: str) -> None:
    pattern = tar_shards(f"memory://{tmp_path.name}", COUNTS)
    manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern))
    train, held_out = captions(tmp_path / "cache")
    assert Counter(train + held_out) == Counter(f"picture {number}, red, round" for number in range(25))
    assert manifest["pictures"] == {"train": len(train), "validation": len(held_out)}
    assert 2 < len(held_out) < 15
    latents = CachedLatents(tmp_path / "cache")
    codec = LatentCodec(load_autoencoder(vae_path))
    stream = Stream(cache_config("x", vae_path, pattern).data, "train")
    items = {item["caption"]: item for item in (stream[index] for index in range(len(train)))}
    for index in range(0, len(train), 3):
        picture = items[train[index]]
        torch.testing.assert_close(latents[index]["latent_mean"][None], codec.encode(to_model(picture["image"][None])))
        assert latents[index]["label"] == picture["label"]
    assert latents.class_names == ("even", "odd")
    assert all(shard["count"] <= 4 for shard in manifest["shards"])
    assert [shard["first"] for shard in latents.caches[0].shards] == latents._firsts


def test_two_processes_are_killed_and_go_on(tmp_path: Path, vae_path: str) -> None:
    pattern = tar_shards(str(tmp_path / "shards"), [6] * 6)
    cache_latents(cache_config(tmp_path / "alone", vae_path, pattern))
    config = cache_config(tmp_path / "two", vae_path, pattern)
    assert run_two(config, last=6) == [-signal.SIGKILL] * 2
    begun = contents(tmp_path / "two")
    assert ".unit-000000.json" in begun
    assert "manifest.json" not in begun
    assert ".unit-000004.json" not in begun
    assert run_two(config, last=None) == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


@pytest.mark.parametrize("kind", ["parquet", "mix"])
def test_other_streams(tmp_path: Path, vae_path: str, kind: str) -> None:
    files = parquet_shards(str(tmp_path / "table"), [6, 5])
    table: dict[str, Any] = {"source": "datasets", "name": "parquet", "data_files": files}
    data: dict[str, Any] = {"caption_column": "text", "label_column": None, "class_names": None, "path": None}
    if kind == "mix":
        tar: dict[str, Any] = {"source": "webdataset", "path": tar_shards(str(tmp_path / "tar"), [3, 4])}
        data["mix"] = {"one": MixedSource(**table), "two": MixedSource(**tar, caption_column="txt")}
    else:
        data |= {**table, "streaming": True}
    cache_latents(cache_config(tmp_path / "cache", vae_path, "", data=data))
    train, held_out = captions(tmp_path / "cache")
    numbers = Counter(int(text.split(",")[0].split()[-1]) for text in train + held_out)
    assert numbers == Counter([*range(11), *(range(7) if kind == "mix" else ())])


def test_captions_are_encoded(tmp_path: Path, vae_path: str) -> None:
    """With the hash of the encoder's weights; of other weights the cache is another."""
    pattern, text = (
        tar_shards(f"memory://{tmp_path.name}", [3, 2]),
        TextConfig(kind="small", width=16, heads=2, layers=1),
    )
    tokenizer = train_tokenizer([f"picture {number}, red, round" for number in range(5)], text)
    encoder = T5EncoderModel(small_t5(text, len(tokenizer))).eval()
    for part in (encoder, tokenizer):
        part.save_pretrained(tmp_path / "t5")
    frozen = TextConfig(kind="pretrained", name=str(tmp_path / "t5"), max_length=9)
    manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, text=frozen))
    assert manifest["text"]["hash"] == weights_hash(encoder)
    for split in ("train", "validation"):
        latents = CachedLatents(tmp_path / "cache", split)
        items = [latents[index] for index in range(len(latents))]
        with torch.no_grad():
            expected = encode_captions(encoder, tokenizer, [item["caption"] for item in items] + [""], 9)
        torch.testing.assert_close(torch.stack([item["cond"] for item in items]), expected[:-1])
        torch.testing.assert_close(latents.null_cond, expected[-1])
    encoder.shared.weight.data[0] += 1
    encoder.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"holds another cache, text\.hash"):
        cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, text=frozen))


def test_pictures_of_mixed_sizes(tmp_path: Path, vae_path: str) -> None:
    base = f"memory://{tmp_path.name}"
    for shard in range(2):
        rows = [row(number, (16, 8) if number % 3 else (8, 8)) for number in range(9 * shard, 9 * shard + 9)]
        write(f"{base}/{shard:03d}.tar", tar_bytes(rows, 9 * shard))
    config = cache_config(tmp_path / "cache", vae_path, f"{base}/{{000..001}}.tar", aspect_ratios=["1:1", "2:1"])
    cache_latents(config)
    latents = CachedLatents(tmp_path / "cache")
    assert latents.shapes == [(3, 6), (4, 4)]
    assert len(latents.groups) == 2
    for shape, group in zip(latents.shapes, latents.groups, strict=True):
        assert all(latents[index]["latent_mean"].shape[1:] == shape for index in group)
        wanted = [0] if shape == (4, 4) else [1, 2]
        assert all(int(str(latents.caption(index)).split(",")[0].split()[-1]) % 3 in wanted for index in group)


def test_what_cannot_be_read_is_left_out_or_named(tmp_path: Path, vae_path: str) -> None:
    tar_shards(f"memory://{tmp_path.name}", COUNTS)
    pattern = f"memory://{tmp_path.name}/{{000..004}}.tar"  # the last is not there
    rows = [row(number) for number in range(9, 13)]
    rows[2]["png"] = b"no picture"
    write(f"memory://{tmp_path.name}/001.tar", tar_bytes(rows, 9))
    content = fsspec.filesystem("memory").cat_file(f"/{tmp_path.name}/003.tar")
    write(f"memory://{tmp_path.name}/003.tar", content[:5_000])
    with pytest.raises(ValueError, match=r"00011' of the shard '.*001\.tar'"):
        cache_latents(cache_config(tmp_path / "raised", vae_path, pattern.replace("004", "003")))
    with pytest.raises(ValueError, match=r"cannot open '.*004\.tar': there is no such file"):  # before anything is read
        cache_latents(cache_config(tmp_path / "new", vae_path, pattern))
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "raised" / "manifest.json").exists()
    manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data={"on_error": "skip"}))
    train, held_out = captions(tmp_path / "cache")
    numbers = sorted(int(text.split(",")[0].split()[-1]) for text in train + held_out)
    assert numbers[:19] == [*range(11), *range(12, 20)]
    assert len(numbers) < 24
    assert manifest["skipped"] == 3  # a picture, the rest of a shard, and a whole one
    again = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data={"on_error": "skip"}))
    assert again == manifest


def test_what_was_unreachable_is_tried_again(tmp_path: Path, vae_path: str) -> None:
    """A shard that comes later, and one that was cut off; with another shuffle buffer, which is no matter."""
    tar_shards(f"memory://{tmp_path.name}", COUNTS)
    memory = fsspec.filesystem("memory")
    names = [f"/{tmp_path.name}/{number:03d}.tar" for number in range(4)]
    contents_of = [memory.cat_file(name) for name in names]
    memory.rm(names[1])
    write(f"memory:/{names[3]}", contents_of[3][:14_000])
    pattern, skip = f"memory://{tmp_path.name}/{{000..003}}.tar", {"on_error": "skip"}
    manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data=skip))
    assert 16 < (count := sum(manifest["pictures"].values())) < 20
    for content in (contents_of[3][:6_000], None):  # nothing is lost when even less can be read meanwhile
        memory.rm(names[3])
        if content is not None:
            write(f"memory:/{names[3]}", content)
        manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data=skip))
        assert (sum(manifest["pictures"].values()), manifest["skipped"]) == (count, 2)
        train, held_out = captions(tmp_path / "cache")
        assert len({*train, *held_out}) == count
    for number in (1, 3):
        write(f"memory:/{names[number]}", contents_of[number])
    for note in (tmp_path / "cache").glob(".unit-*.json"):  # earlier versions did not say what is to be tried again
        note.write_text(note.read_text().replace('"again": true', '"once": true'))
    manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data={**skip, "shuffle_buffer": 64}))
    assert (sum(manifest["pictures"].values()), manifest["skipped"]) == (25, 0)
    train, held_out = captions(tmp_path / "cache")
    assert Counter(train + held_out) == Counter(f"picture {number}, red, round" for number in range(25))


def test_a_connection_that_breaks_is_made_again(tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = tar_shards(f"memory://{tmp_path.name}", [6])
    broken, waited = breaking_connections(monkeypatch)
    manifest = cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data={"on_error": "skip"}))
    assert (broken, manifest["skipped"], sum(manifest["pictures"].values())) == ([0], 0, 6)
    assert len(waited) >= 2


def test_settings_that_streams_have_not(tmp_path: Path, vae_path: str) -> None:
    with pytest.raises(ValueError, match="num_images is for data that is not a stream"):
        cache_config(tmp_path, vae_path, "x.tar", num_images=5)
    with pytest.raises(ValueError, match=r"data\.aspect_ratios is for training"):
        cache_config(tmp_path, vae_path, "x.tar", data={"aspect_ratios": ["1:1"]})
    pattern = tar_shards(f"memory://{tmp_path.name}", [3])
    with pytest.raises(ValueError, match=r"no training rows are left in the stream with where=.*99"):
        cache_latents(cache_config(tmp_path / "cache", vae_path, pattern, data={"where": {"number": [99]}}))
