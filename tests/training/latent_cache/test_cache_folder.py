"""Caches know their pictures, touch their own files alone, and survive a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoders import save_autoencoder
from diffusers import AutoencoderTiny
from PIL import Image
from processes import start_script

from tarflow.data.config import DataConfig
from tarflow.data.latents import CachedLatents
from tarflow.training.flow.config import VaeConfig
from tarflow.training.latent_cache import caching
from tarflow.training.latent_cache import folder as cache_folder
from tarflow.training.latent_cache.caching import cache_latents, same_plan
from tarflow.training.latent_cache.config import CacheConfig


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders a and b of three pictures each."""
    for i in range(6):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(path)
    return tmp_path / "data"


@pytest.fixture
def captioned(pictures: Path) -> Path:
    write_captions(pictures, [f"number {i}" for i in range(6)])
    return pictures


def write_captions(folder: Path, captions: list[str]) -> None:
    rows = [{"file_name": f"{'ab'[i % 2]}/{i}.png", "text": text} for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def cache_config(output: Path, data: Path | DataConfig, vae_path: str, **changes: Any) -> CacheConfig:
    if isinstance(data, Path):
        data = DataConfig(source="folder", path=str(data), image_size=8, validation_fraction=0.0)
    options = {"data": data, "vae": VaeConfig(name=vae_path), "shard_size": 2, "dtype": "float32"}
    return CacheConfig(output=str(output), **{**options, **changes})


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    return {name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()}


def swap_classes(data: Path) -> None:
    (data / "a").rename(data / "c")


def swap_labels(data: Path) -> None:
    (data / "a").rename(data / "x")
    (data / "b").rename(data / "a")
    (data / "x").rename(data / "b")


def rename(data: Path) -> None:
    (data / "a" / "0.png").rename(data / "a" / "1.png")


def repaint(data: Path) -> None:
    Image.new("RGB", (8, 8), (0, 200, 0)).save(data / "a" / "2.png")
    os.utime(data / "a" / "2.png", ns=(0, 10**18))  # a clock need not tell the two instants apart


def add(data: Path) -> None:
    shutil.copy(data / "a" / "0.png", data / "a" / "9.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_classes, "of the training pictures the names of files and the class names changed since"),
        (swap_labels, "of the training pictures the names of files changed since"),
        (rename, "of the training pictures the names of files changed since"),
        (repaint, "of the training pictures .*the times of files changed since"),
        (add, "options.pictures is {'train': 6, 'validation': 0} there and {'train': 7, 'validation': 0} here"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_changed_pictures_are_refused(
    pictures: Path, tmp_path: Path, vae_path: str, change: Callable[[Path], None], message: str, finished: bool
) -> None:
    config = cache_config(tmp_path / "cache", pictures, vae_path)
    cache_latents(config)
    if not finished:  # as if a run had been interrupted after two of three shards
        manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
        (tmp_path / "cache" / "manifest.json").unlink()
        (tmp_path / "cache" / "train-00002.safetensors").unlink()
        noted = {key: manifest[key] for key in ("format", "fingerprint", "settings")}
        (tmp_path / "cache" / "unfinished.json").write_text(json.dumps(noted))
    before = state_of(tmp_path / "cache")
    change(pictures)
    which = "holds another cache" if finished else "holds the beginning of another cache"
    with pytest.raises(ValueError, match=rf"{which}, {message}: take another output or remove that folder"):
        cache_latents(config)
    assert state_of(tmp_path / "cache") == before


def test_changed_captions_are_refused(captioned: Path, tmp_path: Path, vae_path: str) -> None:
    config = cache_config(tmp_path / "cache", captioned, vae_path)
    cache_latents(config)
    times = {name: time for name, (_, time) in state_of(tmp_path / "cache").items() if "safetensors" in name}
    cache_latents(config)  # nothing has changed
    after = {name: time for name, (_, time) in state_of(tmp_path / "cache").items() if "safetensors" in name}
    assert after == times
    write_captions(captioned, [f"number {i + 1}" for i in range(6)])
    with pytest.raises(ValueError, match="of the training pictures the captions changed since"):
        cache_latents(config)
    assert CachedLatents(tmp_path / "cache").caption(0) == "number 0"
    shutil.rmtree(tmp_path / "cache")
    cache_latents(config)
    assert CachedLatents(tmp_path / "cache").caption(0) == "number 1"


def test_changed_archives_are_refused(pictures: Path, tmp_path: Path, vae_path: str) -> None:
    """By contents, whatever the times: an archive's own time may change."""
    archive = Path(shutil.make_archive(str(tmp_path / "data"), "zip", pictures))
    config = cache_config(tmp_path / "cache", archive, vae_path)
    cache_latents(config)
    os.utime(archive, ns=(0, 0))
    cache_latents(config)
    repaint(pictures)
    shutil.make_archive(str(tmp_path / "data"), "zip", pictures)
    with pytest.raises(ValueError, match="of the training pictures the sizes or contents of files changed since"):
        cache_latents(config)


def test_changed_data_sets_are_refused(tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    file = tmp_path / "d.parquet"

    def write(captions: list[str]) -> None:
        images = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(len(captions))]
        kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict({"image": images, "text": captions}, features=kinds).to_parquet(file)

    write(["one", "two"])
    section = {"source": "datasets", "name": "parquet", "data_files": str(file), "caption_column": "text"}
    data = DataConfig(**section, image_size=8, validation_fraction=0.0)
    config = cache_config(tmp_path / "cache", data, vae_path)
    cache_latents(config)
    shutil.rmtree(tmp_path / "hf")
    cache_latents(config)  # made anew by Datasets, of the same file
    time = file.stat().st_mtime_ns
    write(["one", "six"])
    os.utime(file, ns=(time, time + 10**9))
    with pytest.raises(ValueError, match="of the training pictures the files of the data set changed since"):
        cache_latents(config)


def test_caches_of_earlier_versions_can_be_read_but_not_gone_on_with(
    pictures: Path, tmp_path: Path, vae_path: str
) -> None:
    config = cache_config(tmp_path / "cache", pictures, vae_path)
    manifest = cache_latents(config)
    del manifest["settings"]["pictures"]
    manifest["fingerprint"] = "0" * 64
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="it is of an earlier version, which did not note its pictures"):
        cache_latents(config)
    for shard in (tmp_path / "cache").glob("*.safetensors"):
        fingerprint = cache_folder.read_header(shard)["fingerprint"].encode()
        shard.write_bytes(shard.read_bytes().replace(fingerprint, b"0" * 64))
    assert len(CachedLatents(tmp_path / "cache")) == 6


def test_files_of_others_stay(pictures: Path, tmp_path: Path, vae_path: str) -> None:
    folder = tmp_path / "work"
    (folder / "notes.tmp").mkdir(parents=True)
    mine = [
        "draft.tmp",
        "notes.tmp/a.txt",
        "README.md",
        ".vae.tmp",
        "vae.tmp",
        "train.safetensors.tmp",
        ".x.0123abcd.tmp",
    ]
    for name in mine:
        (folder / name).write_text("mine")
    own = ["train-00000.safetensors.tmp", ".train-00001.safetensors.0123abcd.tmp", ".manifest.json.0123abcd.tmp"]
    for name in own:
        (folder / name).write_text("half")
    (folder / ".vae.0123abcd.tmp").mkdir()
    cache_latents(cache_config(folder, pictures, vae_path))
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert not any((folder / name).exists() for name in (*own, ".vae.0123abcd.tmp"))
    assert len(CachedLatents(folder)) == 6


@pytest.mark.parametrize("what", ["autoencoder", "something", "shard", "safetensors", "manifest", "unfinished", "file"])
def test_folders_of_others_are_refused(pictures: Path, tmp_path: Path, vae_path: str, what: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    if what == "autoencoder":
        save_autoencoder(folder / "vae", seed=1)
    elif what == "something":
        (folder / "vae").mkdir()
        (folder / "vae" / "notes.txt").write_text("mine")
    elif what == "shard":
        other = cache_config(tmp_path / "other", pictures, vae_path, dtype="float16")
        cache_latents(other)
        shutil.copy(tmp_path / "other" / "train-00001.safetensors", folder)
    elif what == "safetensors":
        cache_folder.save_file({"x": torch.zeros(2)}, folder / "train-00002.safetensors")
    elif what == "file":
        folder.rmdir()
        folder.write_text("mine")
    else:
        (folder / f"{what}.json").write_text('{"mine": 1}')
    before = state_of(tmp_path)
    messages = {"manifest": "is no manifest of a latent cache", "unfinished": "is not of a cache of this version"}
    messages |= {"autoencoder": "a folder 'vae', which is not this cache's autoencoder: take another output"}
    messages |= {
        "shard": r"a file 'train-00001\.safetensors', which is none of this cache",
        "file": "cannot write|is a file",
    }
    messages |= {"safetensors": r"a file 'train-00002\.safetensors'", "something": messages["autoencoder"]}
    with pytest.raises(ValueError, match=messages[what]):
        cache_latents(cache_config(folder, pictures, vae_path))
    assert state_of(tmp_path) == before


def test_a_failed_start_can_be_changed(pictures: Path, tmp_path: Path, vae_path: str) -> None:
    """Nothing was encoded yet, so nothing is lost."""
    (pictures / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.png"):
        cache_latents(cache_config(tmp_path / "cache", pictures, vae_path))
    assert (tmp_path / "cache" / "unfinished.json").exists()
    Image.new("RGB", (8, 8)).save(pictures / "a" / "0.png")
    cache_latents(cache_config(tmp_path / "cache", pictures, vae_path, flip=True))
    assert CachedLatents(tmp_path / "cache", flip=True).manifest["flip"]
    assert not (tmp_path / "cache" / "unfinished.json").exists()


def test_a_disk_that_is_full_for_a_while(
    pictures: Path, tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    cache_latents(cache_config(whole, pictures, vae_path))
    config, calls, fsync = cache_config(tmp_path / "cache", pictures, vae_path), [], os.fsync

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 3:  # after the note and the first shard
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"train-00001\.safetensors': No space left on device; what is written is kept"
        ):
            cache_latents(config)
    left = {file.name for file in (tmp_path / "cache").iterdir()}
    assert left == {"vae", "train-00000.safetensors", "unfinished.json"}
    time = (tmp_path / "cache" / "train-00000.safetensors").stat().st_mtime_ns
    cache_latents(config)
    assert (tmp_path / "cache" / "train-00000.safetensors").stat().st_mtime_ns == time
    assert {n: c for n, (c, _) in state_of(tmp_path / "cache").items()} == {
        n: c for n, (c, _) in state_of(whole).items()
    }


def test_the_autoencoder_on_a_full_disk(
    pictures: Path, tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise cache_folder.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(AutoencoderTiny, "save_pretrained", full)
    with pytest.raises(OSError, match=r"cannot write '.*vae': I/O error: No space left"):
        cache_latents(cache_config(tmp_path / "cache", pictures, vae_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_command_on_a_full_disk(pictures: Path, tmp_path: Path, vae_path: str) -> None:
    """Files may not grow beyond 12 kB, which the autoencoder's do, so that the system itself refuses them."""
    arguments = ["--output", str(tmp_path / "cache"), "--data.source", "folder", "--data.path", str(pictures)]
    arguments += ["--data.image_size", "8", "--data.validation_fraction", "0", "--vae.name", vae_path]
    size = max(file.stat().st_size for file in Path(vae_path).iterdir())
    process = start_script("scripts/cache_latents.py", arguments, tmp_path / "printed.txt", largest_file=size // 2)
    process.join(300)
    printed = (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert process.exitcode == 2, printed
    assert printed.strip().splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in printed
    assert not (tmp_path / "cache" / "vae").exists()
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_processes_with_copies_of_the_data(
    pictures: Path, tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times may differ, and the first process's count; names may not."""
    config = cache_config(tmp_path / "cache", pictures, vae_path)
    _, first = caching.open_plan(config, torch.device("cpu"))
    for file in pictures.rglob("*.png"):
        os.utime(file, ns=(0, 0))
    _, other = caching.open_plan(config, torch.device("cpu"))
    assert other.fingerprint != first.fingerprint
    monkeypatch.setattr(caching, "gather_objects", lambda value: [first.settings, value])
    assert same_plan(other).fingerprint == first.fingerprint
    rename(pictures)
    _, other = caching.open_plan(config, torch.device("cpu"))
    with pytest.raises(
        ValueError, match="the processes see different data: of the training pictures the names of files"
    ):
        same_plan(other)
