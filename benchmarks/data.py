"""How fast data comes: items a second of each source by number of readers, the share of waiting, and listing many names."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec

from tarflow.benchmarks.data_sources import http_server, picture_sources, random_cache
from tarflow.data.config import DataConfig
from tarflow.data.images import Images
from tarflow.data.latents import open_latents
from tarflow.data.stream.stream import Stream
from tarflow.training.loop.batches import BatchReader, step_sampler, train_loader
from tarflow.training.loop.streaming import Share, StreamReader

#: Steps enough for any benchmark.
ENDLESS = 10**7


@dataclass(frozen=True)
class Reading:
    """One source with one number of readers; medians over repeats.

    Attributes:
        source: its name.
        readers: processes that read, of streams threads; 0 reads in the training process.
        start: seconds to the first batch.
        items_per_second: where nothing else is done.
        per_cpu_second: items a second of the training process's own processor time, in all its threads: what a core would
            do that has nothing else to do.
        waiting: share of the time that is spent waiting for data where ``rate`` items a second are wanted.
    """

    source: str
    readers: int
    start: float
    items_per_second: float
    per_cpu_second: float
    rate: float
    waiting: float


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What is measured.

    Attributes:
        pictures, image_size: made-up pictures, and their side.
        picture_rate, latent_rate: items a second that training is to take.
        shards, shard_size, latent_shape: of the made-up cache.
        mixed: ``data.shuffle_shards`` of caches at URLs, whose copies have room for little more than twice as many.
        latency: seconds of the web server.
        readers, batch: numbers of readers, and pictures of a batch.
        seconds, repeats: of each measurement.
    """

    pictures: int = 2000
    image_size: int = 256
    picture_rate: float = 1000.0
    latent_rate: float = 20_000.0
    shards: int = 32
    shard_size: int = 1024
    latent_shape: tuple[int, int, int] = (4, 32, 32)
    mixed: int = 4
    latency: float = 0.02
    readers: tuple[int, ...] = (0, 1, 2)
    batch: int = 256
    seconds: float = 4.0
    repeats: int = 3


@contextmanager
def opened(config: DataConfig, readers: int, batch: int) -> Iterator[Any]:
    """The batches of a source as a training on one process reads them."""
    if config.is_stream:
        with StreamReader(Stream(config, "train"), Share(batch, 0, 1, 1), readers, 0) as stream:
            yield stream
        return
    images: Any = open_latents(config, "train") if config.source == "latents" else Images(config, "train")
    sampler = step_sampler(images, batch, 0, 1, 1, 0, 0, ENDLESS)
    with BatchReader(train_loader(images, readers, sampler)) as batches:
        yield batches


def measure(config: DataConfig, readers: int, plan: DataPlan, rate: float) -> tuple[float, ...]:
    """Seconds to the first batch, items a second and a second of the processor, and the share of waiting at a rate."""
    began = time.perf_counter()
    with opened(config, readers, plan.batch) as batches:
        next(batches)
        start = time.perf_counter() - began
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        while not count or time.perf_counter() - began < plan.seconds:
            next(batches)
            count += plan.batch
        speed, per_cpu = count / (time.perf_counter() - began), count / max(1e-9, time.process_time() - cpu)
        began, waited = time.perf_counter(), 0.0
        while time.perf_counter() - began < plan.seconds:
            time.sleep(plan.batch / rate)  # as if a GPU worked
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        return start, speed, per_cpu, waited / (time.perf_counter() - began)


@contextmanager
def sources(plan: DataPlan, names: tuple[str, ...]) -> Iterator[dict[str, tuple[DataConfig, float]]]:
    """Made-up data by name, with the rate at which training takes it. It is removed at the end."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tarflow-data-")))
        stack.enter_context(environment("TARFLOW_CACHE", str(root / "copies")))
        found: dict[str, tuple[DataConfig, float]] = {}
        if any(not name.startswith("latents") for name in names):
            stack.enter_context(tables_at(root / "tables"))
            pictures = picture_sources(root, plan.pictures, plan.image_size)
            found |= {name: (config, plan.picture_rate) for name, config in pictures.items()}
        if any(name.startswith("latents") for name in names):
            size = random_cache(root / "cache", plan.shards, plan.shard_size, plan.latent_shape)
            local = DataConfig(source="latents", path=str(root / "cache"), verify=True)
            # Room for less than the cache, so that shards are fetched again in each pass.
            room = (2 * plan.mixed + 2) * size / plan.shards / 1e9
            remote = replace(local, shuffle_shards=plan.mixed, cache_gb=room)
            found["latents"] = local, plan.latent_rate
            if "latents memory" in names:
                memory = fsspec.filesystem("memory")
                memory.put(f"{root}/cache/", f"/{root.name}/", recursive=True)
                stack.callback(memory.rm, f"/{root.name}", recursive=True)
                found["latents memory"] = replace(remote, path=f"memory://{root.name}"), plan.latent_rate
            if "latents http" in names:
                url = stack.enter_context(http_server(root / "cache", plan.latency))
                found["latents http"] = replace(remote, path=url), plan.latent_rate
        yield {name: found[name] for name in names}


@contextmanager
def tables_at(folder: Path) -> Iterator[None]:
    """Have the Datasets library keep what it makes of parquet files in a folder, for a while."""
    import datasets  # imported here because it takes seconds

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def compare_sources(plan: DataPlan, names: tuple[str, ...], report: Any = lambda row: None) -> list[Reading]:
    """Each source with each number of readers, all in turns; ``report`` gets the rows of the last turn."""
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    with sources(plan, names) as configs:
        for repeat in range(plan.repeats):
            for name, (config, rate) in configs.items():
                for readers in plan.readers:
                    gc.collect()
                    found.setdefault((name, readers), []).append(measure(config, readers, plan, rate))
                    if repeat == plan.repeats - 1:
                        report(summary(name, readers, rate, found[name, readers]))
        rates = {name: rate for name, (_, rate) in configs.items()}
    return [summary(name, readers, rates[name], values) for (name, readers), values in found.items()]


def summary(name: str, readers: int, rate: float, values: list[tuple[float, ...]]) -> Reading:
    start, speed, per_cpu, waiting = (statistics.median(column) for column in zip(*values, strict=True))
    return Reading(name, readers, start, speed, per_cpu, rate, waiting)


#: How many folders the empty files are put into.
FOLDERS = 1000


@dataclass(frozen=True)
class Listing:
    """Opening a folder of so many names for training: seconds, of which those of the processor, and megabytes."""

    names: int
    seconds: float
    cpu_seconds: float
    megabytes: float | None


def list_names(count: int) -> Listing:
    """Make folders of ``count`` empty files in all, and open them as training does, both splits and the order of the first
    epoch."""
    with tempfile.TemporaryDirectory(prefix="tarflow-names-") as root:
        for number in range(count):
            folder = Path(root) / f"class{number % FOLDERS:04d}"
            folder.mkdir(exist_ok=True)
            (folder / f"image_{number:07d}.jpg").touch()
        before, began, cpu = resident(), time.perf_counter(), time.process_time()
        config = DataConfig(source="folder", path=root)
        train = Images(config, "train")
        validation = Images(config, "validation", train)
        next(iter(step_sampler(train, 64, 0, 1, 1, 0, 0, 1)))
        seconds, cpu, after = time.perf_counter() - began, time.process_time() - cpu, resident()
        megabytes = None if before is None or after is None else after - before
        return Listing(len(train) + len(validation), seconds, cpu, megabytes)


def resident() -> float | None:
    """Megabytes of this process's memory; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), None)
