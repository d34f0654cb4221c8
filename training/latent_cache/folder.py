"""The folder of a cache, here or at a URL: which files in it are the cache's own, and how they are written, whole or not at
all."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tarflow.common.folders import Folder, LocalFolder, UrlFolder
from tarflow.data.latent_cache import VAE
from tarflow.data.place import MANIFEST
from tarflow.data.shards import FORMAT, checksums, read_header, read_manifest
from tarflow.training.latent_cache.plan import CachePlan, Plan, Shard, difference
from tarflow.vae.codec import autoencoder_hash, load_autoencoder

#: What a cache holds that is being made: its settings, until there is a manifest.
UNFINISHED = "unfinished.json"
#: At URLs, what would have to be read again there otherwise: each shard's record, until there is a manifest.
RECORD = ".{}.json"
#: What a killed run leaves; an earlier version wrote the first kind without the dot and the number.
TEMPORARY = re.compile(
    r"\.?(train|validation)-\d+\.safetensors(\.[0-9a-f]{8})?\.tmp"
    r"|\.\.((train|validation)-\d+\.safetensors|unit-\d+)\.json\.[0-9a-f]{8}\.tmp"
    rf"|\.({re.escape(MANIFEST)}|{re.escape(UNFINISHED)}|{VAE})\.[0-9a-f]{{8}}\.tmp"
)
REMEDY = "take another output or remove that folder"


def check_folder(plan: CachePlan, folder: Folder, vae: Any) -> None:
    """Refuse a folder that holds another cache, whole or not, or files of others by the names of this one's.

    Raises:
        ValueError: that says what differs.
    """
    name = repr(plan.config.output)
    if isinstance(folder, LocalFolder) and folder.local.exists() and not folder.local.is_dir():
        raise ValueError(f"the output {name} is a file: name a folder")
    earlier, unfinished, there = read_manifest(folder), read_unfinished(folder), set(folder.names())
    shards = plan.own_files(there)
    if earlier is not None and earlier["fingerprint"] != plan.fingerprint:
        raise ValueError(f"{name} holds another cache, {difference(earlier['settings'], plan.settings)}: {REMEDY}")
    if earlier is None and shards:
        if unfinished is not None and unfinished["fingerprint"] != plan.fingerprint:
            reason = difference(unfinished["settings"], plan.settings)
            raise ValueError(f"{name} holds the beginning of another cache, {reason}: {REMEDY}")
        for file in shards if unfinished is None else ():
            if not is_shard(file, folder, plan.fingerprint):
                raise ValueError(f"{name} has a file {file!r}, which is none of this cache: {REMEDY}")
    if VAE in there and is_whole(folder) and not same_autoencoder(folder, vae):
        raise ValueError(f"{name} has a folder {VAE!r}, which is not this cache's autoencoder: {REMEDY}")


def prepare_folder(folder: Folder, vae: Any) -> None:
    """Make the cache's folder, remove what a killed run left of its own, and save the autoencoder there.

    Raises:
        OSError: if the autoencoder cannot be written; nothing of it is left.
    """
    if isinstance(folder, LocalFolder):
        folder.local.mkdir(parents=True, exist_ok=True)
    there = folder.names()
    for name in there:
        if TEMPORARY.fullmatch(name):
            folder.remove(name)
    if VAE in there and is_whole(folder):
        return
    try:
        with tempfile.TemporaryDirectory(prefix="tarflow-") as temporary:
            vae.save_pretrained(Path(temporary) / VAE)
            folder.put_folder(Path(temporary) / VAE, VAE)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder.place(VAE), error) from error


def is_whole(folder: Folder) -> bool:
    """Whether the folder of the autoencoder has all that is sent; at a URL its settings come last."""
    return isinstance(folder, LocalFolder) or folder.read(f"{VAE}/config.json") is not None


def start_folder(plan: CachePlan, folder: Folder) -> None:
    """Note what a cache that is begun will be, so that another one is not taken for it."""
    if read_manifest(folder) is None:
        write_json(folder, UNFINISHED, {"format": FORMAT, "fingerprint": plan.fingerprint, "settings": plan.settings})


def finish_folder(folder: Folder, manifest: dict[str, Any]) -> None:
    """Write the manifest, with which the cache is complete."""
    write_json(folder, MANIFEST, manifest)
    folder.remove(UNFINISHED)
    if isinstance(folder, UrlFolder):
        own = {RECORD.format(shard["file"]) for shard in manifest["shards"]}
        for name in sorted(own.intersection(folder.names())):
            folder.remove(name)


def write_json(folder: Folder, name: str, value: Any) -> None:
    """Write a file of one JSON value, whole or not at all."""
    with folder.writing(name) as path:
        path.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8", newline=""
        )


def read_unfinished(folder: Folder) -> dict[str, Any] | None:
    """What an interrupted run noted; None if there is nothing.

    Raises:
        ValueError: if a file of that name is something else.
    """
    content = folder.read(UNFINISHED)
    if content is None:
        return None
    try:
        found = json.loads(content)
        if found["format"] == FORMAT and found["fingerprint"]:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder.place(UNFINISHED)!r} is not of a cache of this version: {REMEDY}")


def is_shard(name: str, folder: Folder, fingerprint: str) -> bool:
    """Whether a file is a whole shard of this cache."""
    try:
        header = read_header(name, folder)
    except (OSError, ValueError):
        return False
    return (header.get("format"), header.get("fingerprint")) == (FORMAT, fingerprint)


def same_autoencoder(folder: Folder, vae: Any) -> bool:
    """Whether a folder holds this autoencoder."""
    try:
        with tempfile.TemporaryDirectory(prefix="tarflow-") as temporary:
            if isinstance(folder, UrlFolder):
                folder.fetch_folder(VAE, Path(temporary))
            place = temporary if isinstance(folder, UrlFolder) else str(folder.local / VAE)
            return autoencoder_hash(load_autoencoder(place)) == autoencoder_hash(vae)
    except Exception:  # noqa: BLE001 (whatever cannot be loaded is not it)
        return False


def write_shard(folder: Folder, name: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    """Write a shard, so that it is whole or not there; returns its record.

    Raises:
        OSError: that names it, if it cannot be written.
    """
    try:
        with folder.writing(name) as temporary:
            save_file(tensors, temporary, {"cache": json.dumps(header, sort_keys=True)})
            record = {**header, "file": name, "bytes": temporary.stat().st_size, **checksums(temporary)}
        if isinstance(folder, UrlFolder):
            write_json(folder, RECORD.format(name), record)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder.place(name), error) from error
    return record


def cannot_write(place: str, error: Exception) -> OSError:
    """The error of a part that cannot be written, as on a full disk."""
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(f"cannot write {place!r}: {reason}; what is written is kept, so make room and run it again")


def kept_record(plan: Plan, shard: Shard, folder: Folder, checksum: str | None) -> dict[str, Any] | None:
    """The record of a shard that an earlier run wrote; None if it is not there, not whole or not the planned one.

    Args:
        checksum: of an earlier manifest, if there is one. Without it a whole file is trusted.
    """
    try:
        noted = folder.read(RECORD.format(shard.file)) if isinstance(folder, UrlFolder) else None
        record = None if noted is None else json.loads(noted)
        if record is None or record["bytes"] != folder.size(shard.file):
            header = read_header(shard.file, folder)
            record = {**header, "file": shard.file, "bytes": folder.size(shard.file), **checksums(shard.file, folder)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(record.get(key) != value for key, value in plan.header(shard).items()):
        return None
    return record if checksum in (None, record["sha256"]) else None
