"""Encodes pictures once: `cache_latents` writes what `tarflow.data.latents.CachedLatents` reads.

Shard k belongs to process k modulo the number of processes and is encoded in batches of its own pictures, so the files
do not depend on how many processes there are, nor on where an earlier run stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from tarflow.common.folders import Folder, check_folder_writable, open_folder, scheme_of
from tarflow.common.processes import gather_objects
from tarflow.common.progress import progress_bar, write_line
from tarflow.data.images import Images, collate
from tarflow.data.shards import FORMAT, read_manifest
from tarflow.training.flow.text import cut_sentence
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.latent_cache.encoding import Encoder, encode, joined
from tarflow.training.latent_cache.folder import (
    check_folder,
    finish_folder,
    kept_record,
    prepare_folder,
    start_folder,
    write_shard,
)
from tarflow.training.latent_cache.plan import SPLITS, CachePlan, Plan, difference, make_plan, without_times
from tarflow.training.latent_cache.streams import StreamPlan, make_stream_plan, write_units
from tarflow.training.loop.agreement import agreed
from tarflow.training.loop.parallel import started_processes
from tarflow.vae.codec import autoencoder_hash, channel_statistics

AnyPlan = TypeVar("AnyPlan", bound=CachePlan)


def cache_latents(config: CacheConfig) -> dict[str, Any]:
    """Write a cache, or what is missing of it, with all processes of `accelerate launch`; returns its manifest.

    Raises:
        ValueError: if the settings do not fit together, or the folder holds a cache of other settings.
        OSError: if a file cannot be written; none is left half-written.
    """
    state = started_processes()
    if state.num_processes > 1 and scheme_of(config.output) == "memory":
        raise ValueError(f"the output {config.output!r} is of one process alone, but there are {state.num_processes}")
    folder = open_folder(config.output)
    encoder, plan = agreed(state, lambda: open_plan(config, state.device))
    plan = same_plan(plan)

    def prepare() -> None:
        if state.is_main_process:
            check_folder(plan, folder, encoder.codec.vae)
            prepare_folder(folder, encoder.codec.vae)
            start_folder(plan, folder)

    agreed(state, prepare)

    def write() -> list[dict[str, Any]]:
        process, processes, shown = state.process_index, state.num_processes, state.is_main_process
        if isinstance(plan, StreamPlan):
            return write_units(plan, encoder, folder, process, processes, shown)
        assert isinstance(plan, Plan)
        return write_shards(plan, encoder, folder, process, processes, shown)

    records = agreed(state, write)
    records = [record for part in gather_objects(records) for record in part]
    agreed(state, lambda: write_manifest(plan, encoder, folder, records) if state.is_main_process else None)
    return read_manifest(folder) or {}


def open_plan(config: CacheConfig, device: torch.device) -> tuple[Encoder, CachePlan]:
    """Load the encoders and open the pictures.

    Raises:
        ValueError: if they cannot be, or the folder cannot be written to.
    """
    check_folder_writable(config.output)
    encoder = Encoder(config, device)
    make: Callable[..., CachePlan] = make_stream_plan if config.data.is_stream else make_plan
    return encoder, make(config, encoder.codec.factor, autoencoder_hash(encoder.codec.vae), encoder.text)


def same_plan(plan: AnyPlan) -> AnyPlan:
    """The first process's plan. Machines with copies of the data may have other times of its files, but nothing else.

    Raises:
        ValueError: if the processes see different pictures or settings.
    """
    all_settings = gather_objects(plan.settings)
    for settings in all_settings:
        if without_times(settings) != without_times(all_settings[0]):
            raise ValueError(f"the processes see different data: {difference(settings, all_settings[0])}")
    return replace(plan, settings=all_settings[0])


class SizedImages(Dataset[dict[str, Any]]):
    """Pictures by number in the source, height and width."""

    def __init__(self, images: dict[str, Images]):
        self.images = images

    def __getitem__(self, key: tuple[str, int, int, int]) -> dict[str, Any]:
        split, index, height, width = key
        return self.images[split].fitted(index, height, width)


def write_shards(
    plan: Plan, encoder: Encoder, folder: Folder, process: int = 0, processes: int = 1, show_progress: bool = False
) -> list[dict[str, Any]]:
    """Write the shards of one process that are not there yet; returns the manifest's records of all its shards."""
    mine = plan.shards[process::processes]
    earlier = read_manifest(folder)
    known = {} if earlier is None else {record["file"]: record["sha256"] for record in earlier["shards"]}
    records = {shard.file: kept_record(plan, shard, folder, known.get(shard.file)) for shard in mine}
    missing = [shard for shard in mine if records[shard.file] is None]
    size = plan.config.batch_size
    keys = [
        [(shard.split, index, *shard.size) for index in shard.indices[start : start + size]]
        for shard in missing
        for start in range(0, len(shard.indices), size)
    ]
    loader = DataLoader(
        SizedImages(plan.images), batch_sampler=keys, collate_fn=collate, num_workers=plan.config.num_workers
    )
    total, left = (sum(len(shard.indices) for shard in shards) for shards in (mine, missing))
    batches = iter(loader)
    with progress_bar(total=total, initial=total - left, unit=" images", disable=not show_progress) as progress:
        for shard in missing:
            parts = islice(batches, -(-len(shard.indices) // size))
            tensors, more = joined(encoder, [encode(encoder, batch, progress) for batch in parts])
            header = {**plan.header(shard), **more}
            records[shard.file] = write_shard(folder, shard.file, tensors, header)
    return [record for record in records.values() if record is not None]


def write_manifest(plan: CachePlan, encoder: Encoder, folder: Folder, records: list[dict[str, Any]]) -> None:
    """Write the manifest of a complete cache and report skipped pictures.

    Args:
        records: of all processes, in any order.
    """
    config = plan.config
    left_out = [record for record in records if record["skipped"]]
    records = plan.in_order(records)
    counts = {split: sum(record["count"] for record in records if record["split"] == split) for split in SPLITS}
    sums = [torch.tensor(record["sums"], dtype=torch.float64) for record in records if record["split"] == "train"]
    mean, std = channel_statistics(torch.stack(sums).sum(0))
    names = plan.class_names
    text, cut = encoder.text, [record for record in records if record.get("cut")]
    if cut:
        count, total = sum(record["cut"] for record in cut), sum(counts.values())
        text = {**(text or {}), "cut": {"count": count, "of": f"{total} captions", "example": cut[0]["cut_example"]}}
        write_line(cut_sentence(count, f"{total} captions", config.text.max_length, cut[0]["cut_example"]))
    kept = ("file", "split", "shape", "first", "count", "bytes", "sha256", "xxh3_128")
    manifest = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "pictures": counts,
        "image_size": config.data.image_size,
        "autoencoder": {"name": config.vae.name, "class": type(encoder.codec.vae).__name__}
        | plan.settings["autoencoder"],
        "factor": encoder.codec.factor,
        "latent_channels": len(mean),
        "latents_mean": mean,
        "latents_std": std,
        "dtype": config.dtype,
        "flip": config.flip,
        "has_captions": plan.has_captions,
        "text": text,
        "class_names": None if names is None else list(names),
        "skipped": sum(record["skipped"] for record in left_out),
        "versions": {name: version(name) for name in ("tarflow", "torch", "diffusers", "transformers", "safetensors")},
        "settings": plan.settings,
        "shards": [{key: record[key] for key in kept if key in record} for record in records],
    }
    finish_folder(folder, manifest)
    if manifest["skipped"]:
        example = min(record["example"] for record in left_out)
        write_line(f"{manifest['skipped']} unreadable images were skipped, for example: {example}")
