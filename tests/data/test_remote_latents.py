"""Caches of latents at URLs and joined ones: fetched before they are needed, at most so much at a time, in a known order."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from autoencoders import save_autoencoder
from latent_caches import COUNT, SHARD, config_of
from safetensors.torch import load_file
from torch import Tensor
from trainings import CLASS_FLOW, train

from tarflow.common.cache import cache_folder
from tarflow.data import shard_store
from tarflow.data.config import DataConfig
from tarflow.data.images import collate
from tarflow.data.latents import CachedLatents
from tarflow.data.shard_store import MissingShardError
from tarflow.data.shards import checksums, is_intact
from tarflow.data.stream.ahead import Ahead
from tarflow.training.flow.resume import check_order
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.loop import order as shard_order
from tarflow.training.loop.batches import BatchReader, fixed_batches, read_batches, step_sampler, train_loader

FLOW = CLASS_FLOW.replace('"width"', '"patch_size": 2, "width"')
#: What one shard takes here, of which four are more than half of the copies' room below.
BYTES = 1967
ROOM = 5.5 * BYTES / 1e9


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, vae_path: str) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    cache_latents(config_of(folder, vae_path))
    return folder


@pytest.fixture
def url(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same cache in memory, with a folder of copies of its own."""
    monkeypatch.setenv("TARFLOW_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr(shard_store, "WAITS", (0.01, 0.02, 0.03))
    fsspec.filesystem("memory").put(f"{local}/", f"/{tmp_path.name}/", recursive=True)
    return f"memory://{tmp_path.name}"


def remove(url: str, name: str) -> None:
    fsspec.filesystem("memory").rm(f"/{url.removeprefix('memory://')}/{name}")


def copies() -> int:
    """Bytes of all copies at one moment: counted again while other threads remove or write some."""
    found, before = listed(), None
    while found != before:
        found, before = listed(), found
    return sum(found.values())


def listed() -> dict[Path, int]:
    """The size of each copy that is there."""
    sizes = {}
    for file in (cache_folder() / "shards").rglob("*.safetensors"):
        with suppress(FileNotFoundError):
            sizes[file] = file.stat().st_size
    return sizes


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b

    return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)


def order(latents: CachedLatents, size: int, processes: int = 1, start: int = 0, total: int = 25) -> list[list[int]]:
    """The pictures of each step, of all processes."""
    parts = [step_sampler(latents, size // processes, rank, processes, 1, 0, start, total) for rank in range(processes)]
    return [[index for part in step for index in part] for step in zip(*parts, strict=True)]


def test_a_cache_at_a_url_has_the_same_pictures(local: Path, url: str) -> None:
    here, there = CachedLatents(local), CachedLatents(url)
    assert len(there) == COUNT
    assert there.groups == here.groups == [range(COUNT)]
    indices = [3, 77, 4, 50, 3, 99]
    assert same(there.__getitems__(indices), collate([here[index] for index in indices]))
    assert there.caption(55) == here.caption(55)
    assert (there.autoencoder_folder() / "config.json").is_file()
    assert len(CachedLatents(url, "validation")) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_stay_within_their_room(url: str, workers: int) -> None:
    latents = CachedLatents(url, shuffle_shards=2, cache_gb=ROOM)
    assert latents.ahead == 15  # three quarters of what is mixed
    expected, seen, most = order(latents, 4), [], 0
    with BatchReader(train_loader(latents, workers, step_sampler(latents, 4, 0, 1, 1, 0, 0, 25))) as batches:
        for batch in batches:
            most = max(most, copies())
            seen.append(batch["caption"])
    assert [[latents.caption(index) for index in step] for step in expected] == seen
    assert Counter(index for step in expected for index in step) == Counter(range(COUNT))
    assert 4 * BYTES <= most <= ROOM * 1e9
    with pytest.raises(
        ValueError, match=r"data\.cache_gb is 1\.0.*e-05, but the shards .* take 1\.19e-05: raise it, or lower"
    ):
        CachedLatents(url, shuffle_shards=3, cache_gb=ROOM)


def test_what_has_arrived_is_counted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy gets its name while nobody counts copies, who would miss it otherwise and let one too many in."""
    cache = CachedLatents(url, shuffle_shards=2, cache_gb=ROOM).caches[0]
    store, shard, arrived, counting = cache.store, cache.shards[0], threading.Event(), threading.Event()
    assert store is not None
    fetch = store.folder.fetch

    def slow(*given: Any) -> None:
        fetch(*given)
        arrived.set()
        assert counting.wait(10)

    monkeypatch.setattr(store.folder, "fetch", slow)
    thread = threading.Thread(target=store.fetched, args=(shard,))
    thread.start()
    assert arrived.wait(10)
    with shard_store.lock(store.root / ".lock"):
        counting.set()
        thread.join(0.3)
        assert thread.is_alive() and not (store.path / shard["file"]).exists()
    thread.join()
    assert (store.path / shard["file"]).is_file()


def test_files_of_others_are_never_removed(url: str) -> None:
    """Not those of a folder "shards" that was there before, however much room is wanted."""
    mine = cache_folder() / "shards" / "mine" / "train-00000.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(10 * BYTES))
    latents = CachedLatents(url, shuffle_shards=1, cache_gb=ROOM)
    for index in range(0, COUNT, SHARD):
        assert latents[index]["skipped"] == []
    assert 4 * BYTES <= copies() - 10 * BYTES <= ROOM * 1e9
    assert mine.is_file()


def test_an_autoencoder_is_there_whole_or_not_at_all(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, sent = CachedLatents(url), []
    memory = type(fsspec.filesystem("memory"))
    get_file = memory.get_file

    def breaking(self: Any, source: str, target: Any, **options: Any) -> None:
        sent.append(source)
        if len(sent) == 2:
            raise ConnectionResetError("connection reset")
        get_file(self, source, target, **options)

    monkeypatch.setattr(memory, "get_file", breaking)
    with pytest.raises(OSError, match="connection reset"):
        latents.autoencoder_folder()
    assert not list((cache_folder() / "shards").rglob("*vae*.tmp"))
    files = {file.name for file in latents.autoencoder_folder().iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert len(sent) == 4
    latents.autoencoder_folder()
    assert len(sent) == 4


@pytest.mark.parametrize("name", ["../../mine.safetensors", "/etc/mine", "..", "a/b"])
def test_a_manifest_names_no_files_elsewhere(url: str, name: str) -> None:
    memory, path = fsspec.filesystem("memory"), f"/{url.removeprefix('memory://')}/manifest.json"
    manifest = json.loads(memory.cat_file(path))
    manifest["shards"][3]["file"] = name
    memory.pipe_file(path, json.dumps(manifest).encode())
    with pytest.raises(ValueError, match=f"the manifest of the cache '{url}' names '{name}', which is no file in it"):
        CachedLatents(url)


def test_threads_that_fetch_end_with_the_reader(url: str) -> None:
    latents, before = CachedLatents(url, shuffle_shards=2), set(threading.enumerate())
    for _ in range(2):  # and begin again
        with BatchReader(train_loader(latents, 0, step_sampler(latents, 4, 0, 1, 1, 0, 0, 25))) as batches:
            next(batches)
            assert set(threading.enumerate()) - before
        assert not set(threading.enumerate()) - before


def test_a_thread_gathers_the_next_batches(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what the reading thread itself would, and its errors in their turn."""
    latents, before = CachedLatents(local), set(threading.enumerate())
    expected = [collate([latents[index] for index in step]) for step in order(latents, 4)]
    with BatchReader(train_loader(latents, 0, step_sampler(latents, 4, 0, 1, 1, 0, 0, 25))) as batches:
        assert len(set(threading.enumerate()) - before) == 1
        assert all(same(batch, wanted) for batch, wanted in zip(batches, expected, strict=True))
    assert not set(threading.enumerate()) - before
    read, place = CachedLatents.__getitems__, order(latents, 4)[3]

    def breaking(self: CachedLatents, indices: list[int]) -> Any:
        if indices == place:
            raise OSError("the disk is gone")
        return read(self, indices)

    monkeypatch.setattr(CachedLatents, "__getitems__", breaking)
    with BatchReader(train_loader(latents, 0, step_sampler(latents, 4, 0, 1, 1, 0, 0, 25))) as batches:
        assert all(same(next(batches), wanted) for wanted in expected[:3])
        with pytest.raises(ValueError, match="the disk is gone"):
            next(batches)


def test_batches_of_a_cache_are_read_together(local: Path) -> None:
    latents = CachedLatents(local)
    (batch,) = read_batches(latents, [3, 77, 4])
    assert same(batch, collate([latents[index] for index in (3, 77, 4)]))


def test_the_order_is_a_function_of_the_step(url: str) -> None:
    latents = CachedLatents(url, shuffle_shards=3)
    whole = order(latents, 8, total=40)
    assert order(latents, 8, processes=2, total=40) == order(latents, 8, processes=4, total=40) == whole
    assert order(latents, 8, start=17, total=40) == whole[17:]
    flat = [index for step in whole for index in step]
    assert all(sorted(flat[start : start + COUNT]) == list(range(COUNT)) for start in (0, COUNT, 2 * COUNT))
    assert flat[:COUNT] != flat[COUNT : 2 * COUNT]
    assert len({index // SHARD for index in flat[: 3 * SHARD]}) == 3  # so many shards are mixed at a time
    assert flat[: 3 * SHARD] != sorted(flat[: 3 * SHARD])


def test_all_pictures_may_be_mixed(local: Path, url: str) -> None:
    assert order(CachedLatents(url, shuffle_shards=0), 8) == order(CachedLatents(local), 8)


def test_held_out_pictures_come_from_few_shards(url: str) -> None:
    latents = CachedLatents(url, shuffle_shards=2)
    (batch,) = fixed_batches(latents, 16, 16)
    assert len({index // SHARD for index in batch}) == 2
    assert sum(map(len, fixed_batches(latents, COUNT, 16))) <= COUNT
    assert fixed_batches(CachedLatents(url, shuffle_shards=0), COUNT, COUNT) == [list(range(COUNT))]


@pytest.mark.parametrize("harm", ["missing", "cut off", "changed"])
def test_a_shard_that_cannot_be_read(url: str, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, tries = CachedLatents(url), []
    name = "train-00003.safetensors"
    fetch = type(latents.caches[0].folder).fetch

    def counting(self: Any, file: str, target: Path) -> None:
        tries.append(self.place(file))  # readers of other tests may still fetch shards of these names
        fetch(self, file, target)

    monkeypatch.setattr(type(latents.caches[0].folder), "fetch", counting)
    memory = fsspec.filesystem("memory")
    path = f"/{url.removeprefix('memory://')}/{name}"
    content = memory.cat_file(path)
    memory.rm(path)
    if harm != "missing":
        memory.pipe_file(path, content[:-10] + (b"" if harm == "cut off" else b"0123456789"))
    reasons = {"missing": "No such file", "cut off": r"it has \d+ bytes instead of", "changed": "its checksum is not"}
    with pytest.raises(
        MissingShardError, match=rf"{name}' cannot be read, {reasons[harm]}.*\(tried 4 times in .* seconds\)"
    ):
        latents[3 * SHARD]
    assert tries.count(f"{url}/{name}") == 4
    assert latents[2 * SHARD]["skipped"] == []
    latents.close()  # what is fetched ahead is whole then
    assert not list((cache_folder() / "shards").rglob("*.tmp"))
    memory.pipe_file(path, content)  # it is mended
    assert latents[3 * SHARD]["skipped"] == []
    if harm == "missing":
        remove(url, name)
        with pytest.raises(ValueError, match=f"the shard '{url}/{name}' is not there: run tarflow cache-latents again"):
            CachedLatents(url)


def test_a_thread_that_is_ended_makes_no_further_value() -> None:
    """Which might be a shard that is fetched for seconds."""
    made: list[int] = []

    def values() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    ahead = Ahead(values(), 1)
    while len(made) < 2:  # the second waits for room
        time.sleep(0.01)
    ahead.close()
    ahead.wait(time.monotonic() + 60)
    assert made == [0, 1]


def test_a_cache_that_is_gone_on_with_meanwhile(url: str) -> None:
    """A shard that now has more pictures, as `cache-latents` writes what it could not read before."""
    latents, name = CachedLatents(url), "train-00003.safetensors"
    path = f"/{url.removeprefix('memory://')}"
    memory = fsspec.filesystem("memory")
    manifest = json.loads(memory.cat_file(f"{path}/manifest.json"))
    (shard,) = (shard for shard in manifest["shards"] if shard["file"] == name)
    memory.pipe_file(f"{path}/{name}", b"more" + memory.cat_file(f"{path}/{name}"))
    memory.pipe_file(f"{path}/manifest.json", json.dumps({**manifest, "shards": [{**shard, "bytes": 1}]}).encode())
    with pytest.raises(MissingShardError, match=rf"{name}' cannot be read, it has .* is another one than at the start"):
        latents[3 * SHARD]


def test_a_checkpoint_knows_how_many_pictures_a_cache_has(local: Path) -> None:
    order = CachedLatents(local, shuffle_shards=2).order
    assert order is not None and order["pictures"] == [COUNT]
    check_order(Path("step"), {"order": {**order, "pictures": None}}, {"order": order})  # earlier ones do not tell
    with pytest.raises(ValueError, match="was trained on caches of 90 pictures, but they have 100 now"):
        check_order(Path("step"), {"order": {**order, "pictures": [90]}}, {"order": order})


def test_going_on_without_a_shard(url: str) -> None:
    name = "train-00003.safetensors"
    latents = CachedLatents(url, on_error="skip")
    whole = latents.__getitems__([40, 41])
    remove(url, name)
    batch = latents.__getitems__([30, 40, 31])
    assert torch.equal(batch["latent_mean"][[0, 1]], whole["latent_mean"][[0, 0]])
    assert torch.equal(batch["latent_mean"][2], whole["latent_mean"][1])
    assert len(batch["skipped"]) == 1
    assert f"the shard '{url}/{name}' cannot be read" in batch["skipped"][0]
    opened = CachedLatents(url, on_error="skip")  # known from the listing
    assert "is not there" in opened[30]["skipped"][0]
    assert same({**opened[30], "skipped": []}, opened[40])


def joined(local: Path, tmp_path: Path, vae_path: str, **changes: Any) -> Path:
    cache_latents(config_of(tmp_path / "other", vae_path, **{"data": DataConfig(image_size=8, seed=1), **changes}))
    return tmp_path / "other"


def test_caches_are_joined(local: Path, tmp_path: Path, vae_path: str) -> None:
    other = joined(local, tmp_path, vae_path, num_images=25)
    first, second, both = CachedLatents(local), CachedLatents(other), CachedLatents([local, other])
    assert (len(both), both.groups, both.mixed) == (125, [range(125)], 0)
    assert same(both[99], first[99])
    assert same(both[100], second[0])
    assert both.fingerprints == [first.manifest["fingerprint"], second.manifest["fingerprint"]]
    assert Counter(index for step in order(both, 25, total=5) for index in step) == Counter(range(125))
    latents = torch.cat([one.__getitems__(range(len(one)))["latent_mean"] for one in (first, second)]).double()
    std, mean = torch.std_mean(latents, (0, 2, 3), correction=0)
    assert both.latents_mean == pytest.approx(mean.tolist(), rel=1e-3)
    assert both.latents_std == pytest.approx(std.tolist(), rel=1e-3)


def test_caches_have_shares_by_weights(local: Path, tmp_path: Path, vae_path: str) -> None:
    other = joined(local, tmp_path, vae_path, num_images=25)
    both = CachedLatents([local, other], weights=[1, 3])
    assert [stream.share for stream in both.streams] == [0.25, 0.75]
    flat = [index for step in order(both, 50, total=400) for index in step]
    counts = Counter(flat)
    assert sum(counts[index] for index in range(100)) == 5_000  # of 20,000 pictures
    assert {counts[index] for index in range(100, 125)} == {600}
    assert max(counts[index] for index in range(100)) - min(counts[index] for index in range(100)) <= 1
    assert order(both, 50, processes=2, start=350, total=400) == order(both, 50, total=400)[350:]
    mean = [0.25 * a + 0.75 * b for a, b in zip(*(CachedLatents(x).latents_mean for x in (local, other)), strict=True)]
    assert both.latents_mean == pytest.approx(mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "autoencoder",
            r"are of different autoencoders, or of one with different scaling factors, .*; cache both with the same",
        ),
        ("size", "one is of pictures of 8 pixels, the other of pictures of 16 pixels"),
    ],
)
def test_caches_that_do_not_fit_together(local: Path, tmp_path: Path, vae_path: str, change: str, message: str) -> None:
    if change == "autoencoder":
        other = joined(local, tmp_path, save_autoencoder(tmp_path / "vae", seed=1), num_images=4)
    else:
        other = joined(local, tmp_path, vae_path, num_images=4, data=DataConfig(image_size=16))
    with pytest.raises(ValueError, match=f"the caches '{local}' and '{other}' do not fit together: .*{message}"):
        CachedLatents([local, other])


def test_several_shapes_and_caches_take_turns(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are of one shape, and of one cache where there are weights."""
    wide = Path(shutil.copytree(local, tmp_path / "wide"))
    manifest = json.loads((wide / "manifest.json").read_text())
    for shard in manifest["shards"][5:10]:
        shard["shape"] = [2, 8]
    (wide / "manifest.json").write_text(json.dumps(manifest))
    both = CachedLatents([local, wide], weights=[1, 1], shuffle_shards=2)
    assert (both.shapes, [len(group) for group in both.groups]) == ([(4, 4), (2, 8)], [150, 50])
    assert [stream.share for stream in both.streams] == [0.5, 0.25, 0.25]
    kinds = Counter()
    monkeypatch.setattr(shard_order, "PATTERN", 100)
    for step in order(both, 10, total=200):
        (kind,) = {next(n for n, s in enumerate(both.streams) if any(i in shard for shard in s.shards)) for i in step}
        kinds[kind] += 1
    assert kinds == {0: 100, 1: 50, 2: 50}
    even = CachedLatents([local, wide], shuffle_shards=2)
    assert [stream.share for stream in even.streams] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ["a", "b"], "weights": [1.0]}, "data.weights has 1 numbers: give one for each cache"),
        ({"path": ["a", "b"], "weights": [1.0, 0.0]}, "data.weights must be positive"),
        ({"path": "a", "shuffle_shards": -1}, "data.shuffle_shards must be 0"),
        ({"path": "a", "cache_gb": 0.0}, "data.cache_gb must be positive, got 0.0"),
        ({"path": ["a"], "source": "folder"}, "data.path is a list, but data.source 'folder' takes one"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "latents", **settings})


def test_no_cache_at_a_url() -> None:
    with pytest.raises(ValueError, match="there is no latent cache in 'memory://nowhere': make one with"):
        CachedLatents("memory://nowhere")


def test_training_goes_on_with_the_same_bits(local: Path, url: str, tmp_path: Path) -> None:
    """From a URL as from the folder, also in the middle of a pass; in another order it does not go on."""

    def run(name: str, path: str, *arguments: str, joined: bool = False) -> dict[str, Tensor]:
        paths = json.dumps([path, path]) if joined else path
        options = ["--data.source", "latents", "--data.path", paths, "--data.image_size", "8", "--train.steps", "4"]
        train(tmp_path / name, *options, *arguments, flow=FLOW)
        return load_file(tmp_path / name / "pipeline" / "flow" / "diffusion_pytorch_model.safetensors")

    mixed = ("--data.shuffle_shards", "2", "--data.cache_gb", str(ROOM))
    whole = run("whole", url, *mixed)
    run("parts", url, *mixed, "--log.checkpoint_every", "2")
    resume = ("--resume", str(tmp_path / "parts" / "checkpoints" / "step_00000002"))
    shutil.rmtree(cache_folder() / "shards")
    again = run("again", url, *mixed, *resume, "--train.num_workers", "1")
    here = run("here", str(local), *mixed)
    for other in (again, here):
        assert all(torch.equal(whole[key], other[key]) for key in whole)
    for arguments, message in (
        (("--data.shuffle_shards", "3"), r"data\.shuffle_shards 2, but it is 3 here, which is another order"),
        (("--data.shuffle_shards", "2", "--data.weights", "[1]"), r"data\.weights None, but it is \[1\.0\] here"),
    ):
        with pytest.raises(ValueError, match=message):
            run("other", str(local), *arguments, *resume)
    with pytest.raises(ValueError, match=r"was trained on other caches than data\.path names"):
        run("other", str(local), "--data.shuffle_shards", "2", *resume, joined=True)


def test_copies_are_compared_by_the_fastest_checksum_of_their_record(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"0123456789")
    record = checksums(path)
    older = {"sha256": record["sha256"]}  # of caches that were made before there was another
    assert is_intact(path, record)
    assert is_intact(path, older)
    assert is_intact(path, {**record, "sha256": "of something else"})
    path.write_bytes(b"0123456788")
    assert not is_intact(path, record)
    assert not is_intact(path, older)
