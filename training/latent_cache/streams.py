"""Caches of streams: each shard of the stream is encoded by one process and becomes shards of its own, so that the files do
not depend on how many processes there are, nor on where an earlier run stopped."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tarflow.common.folders import Folder, UrlFolder
from tarflow.common.progress import progress_bar
from tarflow.data.images import collate
from tarflow.data.shards import FORMAT, file_hash
from tarflow.data.stream.numbered import NumberedReader
from tarflow.data.stream.reading import shard_rows
from tarflow.data.stream.rows import Row, RowReader
from tarflow.data.stream.shards import has_own_split
from tarflow.data.stream.stream import Stream
from tarflow.data.stream.tar import KEY
from tarflow.pipeline.call.aspect import bucket_size, ratio_of
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.latent_cache.encoding import Encoded, Encoder, encode, joined
from tarflow.training.latent_cache.folder import write_json, write_shard
from tarflow.training.latent_cache.plan import SPLITS, CachePlan, options_of, settings_of

SHARD = re.compile(r"(train|validation)-\d{10}\.safetensors")
#: In a record, that not all of its shard could be read: it is tried again by the next run.
AGAIN = "again"
#: What each shard of the stream became, by its number.
NOTE = ".unit-{:06d}.json"


class Unread(str):
    """Says why the rest of a shard could not be read."""


@dataclass(frozen=True)
class Unit:
    """One shard of a stream.

    Attributes:
        number: among all.
        source, shard: the stream among several, and the shard in it.
        splits: of which it has rows.
    """

    number: int
    source: int
    shard: int
    splits: tuple[str, ...]


@dataclass(frozen=True)
class StreamPlan(CachePlan):
    """All shards of a stream.

    Attributes:
        streams: by split.
        units: the shards.
    """

    streams: dict[str, Stream]
    units: list[Unit]

    def own_files(self, names: Collection[str]) -> list[str]:
        return sorted(name for name in names if SHARD.fullmatch(name))

    def in_order(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """By split, then those of one shape together.

        Raises:
            ValueError: if there are no training pictures.
        """
        found = []
        for split in SPLITS:
            first = 0
            mine = [record for record in records if record["split"] == split]
            for record in sorted(mine, key=lambda record: (record["shape"], record["file"])):
                found.append({**record, "first": first})
                first += record["count"]
        if not found or found[0]["split"] != "train":
            raise ValueError(f"no training rows are left in the stream with where={self.config.data.where}")
        return found


def make_stream_plan(config: CacheConfig, factor: int, autoencoder: str, text: dict[str, Any] | None) -> StreamPlan:
    """Open a stream and count its shards: the same in every process; arguments and errors as of `make_plan`."""
    side, multiple = config.data.image_size, factor * config.unit
    if config.aspect_ratios is None and side % multiple:
        raise ValueError(f"data.image_size ({side}) must be a multiple of {multiple}, the autoencoder's × unit")
    sizes = [bucket_size(ratio_of(name), side, multiple) for name in config.aspect_ratios or ()] or [(side, side)]
    sizes = list(dict.fromkeys(sizes))
    streams = {split: Stream(config.data, split, config.data.seed, sizes) for split in SPLITS}
    if text is not None and not streams["train"].has_captions:
        raise ValueError("text.kind is 'pretrained', but the data has no captions")
    units: list[Unit] = []
    for source, part in enumerate(streams["train"].configs):
        own = has_own_split(part)
        for split in SPLITS if own else SPLITS[:1]:
            count = len(streams[split].shards[source].names)
            splits = (split,) if own else SPLITS
            units += [Unit(len(units) + shard, source, shard, splits) for shard in range(count)]
    pictures = {split: {"data": stream.rows_identity} for split, stream in streams.items()}
    settings = settings_of(config, autoencoder, text, options_of(config, factor), pictures)
    train = streams["train"]
    return StreamPlan(config, settings, train.class_names, train.has_captions, streams, units)


def write_units(
    plan: StreamPlan,
    encoder: Encoder,
    folder: Folder,
    process: int = 0,
    processes: int = 1,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Encode the stream's shards of one process that are not there yet; returns the records of all that they became."""
    records: list[dict[str, Any]] = []
    mine = plan.units[process::processes]
    with (
        ThreadPoolExecutor(max(1, plan.config.num_workers)) as pool,
        progress_bar(unit=" images", disable=not show_progress) as progress,
    ):
        for unit in mine:
            found = earlier = kept_unit(plan, unit, folder)
            if found is None or any(
                record.get(AGAIN, record.get("skipped")) for record in found
            ):  # earlier notes lack it
                found = write_unit(plan, unit, encoder, folder, pool, progress, earlier or ())
                content = {"format": FORMAT, "fingerprint": plan.fingerprint, "records": found}
                write_json(folder, NOTE.format(unit.number), content)
            else:
                progress.update(sum(record["count"] for record in found))
            records += found
    return records


def kept_unit(plan: StreamPlan, unit: Unit, folder: Folder) -> list[dict[str, Any]] | None:
    """The records of what an earlier run made of a shard; None if that is not all there. Checksums are compared of files
    on this machine, at URLs sizes alone."""
    try:
        note = json.loads(folder.read(NOTE.format(unit.number)) or b"null")
        if note is None or (note["format"], note["fingerprint"]) != (FORMAT, plan.fingerprint):
            return None
        records: list[dict[str, Any]] = note["records"]
        for record in (record for record in records if record["count"]):
            if folder.size(record["file"]) != record["bytes"]:
                return None
            if not isinstance(folder, UrlFolder) and file_hash(record["file"], folder) != record["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return records


def write_unit(
    plan: StreamPlan,
    unit: Unit,
    encoder: Encoder,
    folder: Folder,
    pool: Executor,
    progress: Any,
    earlier: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Encode one shard of the stream; its pictures of each split and size go to files of ``shard_size``.

    Args:
        earlier: records of an earlier run that could not read the shard to its end. Where this one cannot either, files
            that have more pictures are kept.

    Raises:
        ValueError: that names shard and key of what cannot be read, if that is not to be left out.
    """
    config = plan.config
    waiting: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    encoded: dict[tuple[str, tuple[int, ...]], list[Encoded]] = {}
    records: list[dict[str, Any]] = []
    skipped: list[str] = []
    parts = dict.fromkeys(SPLITS, 0)
    before = {record["file"]: {**record, "skipped": 0, AGAIN: False} for record in earlier if record["count"]}
    unread = False

    def put(kind: tuple[str, tuple[int, ...]]) -> None:
        batch = collate(waiting.pop(kind))
        batch.pop("key", None)
        encoded.setdefault(kind, []).append(encode(encoder, batch, progress))

    def write(kind: tuple[str, tuple[int, ...]]) -> None:
        split, size = kind
        batches = encoded.pop(kind)
        count = sum(batch.count for batch in batches)
        name = f"{split}-{unit.number:06d}{parts[split]:04d}.safetensors"
        parts[split] += 1
        kept = before.pop(name, None)
        if unread and kept is not None and kept["count"] > count:
            records.append(kept)
            return
        tensors, more = joined(encoder, batches)
        header = {"format": FORMAT, "fingerprint": plan.fingerprint, "split": split, "size": list(size), "count": count}
        records.append(write_shard(folder, name, tensors, {**header, **more}))

    for split, item in items_of(plan, unit, pool):
        if isinstance(item, str):
            skipped.append(item)
            unread = unread or isinstance(item, Unread)
            continue
        kind = (split, tuple(item["image"].shape[1:]))
        waiting.setdefault(kind, []).append(item)
        done = sum(batch.count for batch in encoded.get(kind, ()))
        if len(waiting[kind]) == min(config.batch_size, config.shard_size - done):
            put(kind)
            if done + encoded[kind][-1].count == config.shard_size:
                write(kind)
    for kind in sorted(waiting):
        put(kind)
    for kind in sorted(encoded):
        write(kind)
    if unread:
        records += before.values()
    if skipped:  # also where nothing was left that has a file
        first = records[0] if records else {"split": None, "count": 0}
        records[:1] = [{**first, "skipped": len(skipped), "example": min(skipped), AGAIN: unread}]
    return records


def items_of(plan: StreamPlan, unit: Unit, pool: Executor) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The items of one shard, each with its split, decoded by a pool; texts say what was left out."""
    skip = plan.config.data.on_error == "skip"
    waiting: deque[tuple[str, Future[dict[str, Any] | str] | str]] = deque()
    for split, row in rows_of(plan, unit, skip):
        reader = plan.streams[split].readers[unit.source]
        waiting.append((split, row if isinstance(row, str) else pool.submit(decoded, reader, row, skip)))
        if len(waiting) > plan.config.batch_size:
            split, result = waiting.popleft()
            yield split, result if isinstance(result, str) else result.result()
    for split, result in waiting:
        yield split, result if isinstance(result, str) else result.result()


def decoded(reader: RowReader | NumberedReader, row: Row, skip: bool) -> dict[str, Any] | str:
    try:
        return reader.item(row)
    except ValueError as error:
        if not skip:
            raise
        return str(error)


def rows_of(plan: StreamPlan, unit: Unit, skip: bool) -> Iterator[tuple[str, Row | str]]:
    """The wanted rows of one shard in its order, each with its split."""
    shards = plan.streams[unit.splits[0]].shards[unit.source]
    readers = {split: plan.streams[split].readers[unit.source] for split in unit.splits}
    name = shards.names[unit.shard]
    try:
        for number, values in shard_rows(shards, unit.shard, 0):
            key = values.get(KEY)
            said = f"row {number} of the shard {name!r}" if key is None else f"{key!r} of the shard {name!r}"
            row = Row(values, unit.source, unit.shard, number, 0, said)
            try:
                splits = [split for split, reader in readers.items() if reader.wanted(row)]
            except ValueError as error:
                if not skip:
                    raise
                yield unit.splits[0], str(error)
                continue
            for split in splits:
                yield split, row
    except ValueError as error:
        if not skip:
            raise
        yield unit.splits[0], Unread(error)
