"""The benchmark of reading data: every source is read as training does, and what is counted is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tarflow.benchmarks.choices import DATA_SOURCES
from tarflow.benchmarks.data import DataPlan, compare_sources, list_names, opened, sources
from tarflow.benchmarks.data_sources import random_cache
from tarflow.cli import benchmark
from tarflow.data.latents import CachedLatents

PLAN = DataPlan(
    pictures=24,
    image_size=16,
    shards=6,
    shard_size=8,
    latent_shape=(2, 4, 4),
    mixed=1,
    latency=0.001,
    readers=(0,),
    batch=8,
    seconds=0.05,
    repeats=1,
)


def test_every_source_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.benchmarks.data.gc.collect", lambda: 0)  # which takes longer than all that is read
    rows = compare_sources(PLAN, DATA_SOURCES)
    assert [row.source for row in rows] == list(DATA_SOURCES)
    assert all(row.items_per_second > 0 and row.per_cpu_second > 0 and row.start > 0 for row in rows)
    assert all(0 <= row.waiting <= 1 for row in rows)


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    random_cache(tmp_path / "cache", 6, 8, (2, 4, 4))
    latents = CachedLatents(tmp_path / "cache")
    assert (len(latents), latents.shapes, latents.class_names) == (48, [(4, 4)], tuple(map(str, range(10))))
    with sources(PLAN, ("latents http",)) as found, opened(found["latents http"][0], 0, 8) as batches:
        for _ in range(12):  # two passes, of which the second fetches again what had to go
            batch = next(batches)
            assert batch["skipped"] == []
            assert all(
                any(torch.equal(mean, latents[place]["latent_mean"]) for place in range(48))
                for mean in batch["latent_mean"]
            )


def test_names_are_listed() -> None:
    listing = list_names(200)
    assert listing.names == 200
    assert listing.seconds > 0


@pytest.mark.parametrize("option", ["--readers", "--seconds"])
def test_wrong_options_are_one_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["data", option, "-1"])
    assert capsys.readouterr().err.startswith(f"error: {option} must be")
