"""Caches of latents that are written to URLs, by several processes, and gone on with after they were killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from autoencoders import save_autoencoder
from latent_caches import config_of, run_two

from tarflow.data.latents import CachedLatents
from tarflow.data.shards import checksums
from tarflow.training.latent_cache import caching
from tarflow.training.latent_cache.caching import Encoder, cache_latents
from tarflow.training.latent_cache.config import CacheConfig


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, vae_path: str) -> dict[str, bytes]:
    """What a cache on this machine holds."""
    folder = tmp_path_factory.mktemp("cache")
    cache_latents(small(folder, vae_path))
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def small(output: Path | str, vae_path: str) -> CacheConfig:
    return config_of(output, vae_path, num_images=44, batch_size=5)


def contents(url: str) -> dict[str, bytes]:
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    return {name.removeprefix(f"{root}/"): memory.cat_file(name) for name in memory.find(root)}


def break_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have encoding interrupted at a batch."""
    calls, latents = [], Encoder.latents

    def breaking(self: Encoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(images))
        if len(calls) == count:
            raise KeyboardInterrupt
        return latents(self, images)

    monkeypatch.setattr(Encoder, "latents", breaking)


def test_what_is_at_a_url_is_what_is_in_a_folder(
    expected: dict[str, bytes], tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}/cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 6)
        cache_latents(small(url, vae_path))
    begun = {".train-00000.safetensors.json", ".train-00001.safetensors.json", "unfinished.json"}
    begun |= {"train-00000.safetensors", "train-00001.safetensors", "vae/config.json"}
    assert contents(url).keys() - expected.keys() == {name for name in begun if name not in expected}
    assert begun <= contents(url).keys()
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{tmp_path.name}/cache/.train-00002.safetensors.0123abcd.tmp", b"of a killed run")
    memory.rm(f"/{tmp_path.name}/cache/vae/config.json")  # as if it had been killed while it sent the autoencoder
    with monkeypatch.context() as patch:
        patch.setattr("tarflow.training.latent_cache.folder.checksums", only_new_files)
        cache_latents(small(url, vae_path))
    assert contents(url) == expected
    cache_latents(small(url, vae_path))  # is whole already
    assert contents(url) == expected
    assert len(CachedLatents(url)) == 44


def only_new_files(path: Path | str, folder: Any = None) -> dict[str, str]:
    """Stands for `checksums`: what was sent before must not be read again."""
    assert folder is None
    return checksums(path)


@pytest.mark.parametrize("what", ["autoencoder", "cache"])
def test_places_of_others_are_refused(tmp_path: Path, vae_path: str, what: str) -> None:
    url = f"memory://{tmp_path.name}/cache"
    if what == "autoencoder":
        fsspec.filesystem("memory").put(
            f"{save_autoencoder(tmp_path / 'other', seed=1)}/", f"{url}/vae/", recursive=True
        )
    else:
        cache_latents(config_of(url, vae_path, num_images=4, num_validation_images=0, flip=True))
    before = contents(url)
    message = {"autoencoder": "a folder 'vae', which is not this cache's", "cache": "holds another cache, options.flip"}
    with pytest.raises(ValueError, match=message[what]):
        cache_latents(config_of(url, vae_path, num_images=4, num_validation_images=0))
    assert contents(url) == before


def test_two_processes_are_killed_and_go_on(expected: dict[str, bytes], tmp_path: Path, vae_path: str) -> None:
    folder = tmp_path / "cache"
    config = small(f"local://{folder}", vae_path)  # by fsspec, as file:// is not
    assert run_two(config, last=4) == [-signal.SIGKILL] * 2  # in the second shard of each
    whole = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert whole.keys() == {"train-00000.safetensors", "train-00001.safetensors"}
    assert not (folder / "manifest.json").exists()
    assert run_two(config, last=None) == [0, 0]
    assert {name: (folder / name).stat().st_mtime_ns for name in whole} == whole
    assert {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()} == expected


def test_memory_is_of_one_process(tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes = 2

    monkeypatch.setattr(caching, "started_processes", Two)
    with pytest.raises(ValueError, match="'memory://x' is of one process alone, but there are 2"):
        cache_latents(small("memory://x", vae_path))
