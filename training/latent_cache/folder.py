"""The folder of a cache: which files in it are the cache's own, and how they are written, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tarflow.common.files import replaced, write_json
from tarflow.data.place import MANIFEST
from tarflow.data.shards import FORMAT, file_hash, read_header, read_manifest
from tarflow.training.latent_cache.plan import Plan, Shard, difference
from tarflow.vae.codec import autoencoder_hash, load_autoencoder

#: What a cache holds that is being made: its settings, until there is a manifest.
UNFINISHED = "unfinished.json"
VAE = "vae"
#: What a killed run leaves; an earlier version wrote the first kind without the dot and the number.
TEMPORARY = re.compile(
    r"\.?(train|validation)-\d+\.safetensors(\.[0-9a-f]{8})?\.tmp"
    rf"|\.({re.escape(MANIFEST)}|{re.escape(UNFINISHED)}|{VAE})\.[0-9a-f]{{8}}\.tmp"
)
REMEDY = "take another output or remove that folder"


def check_folder(plan: Plan, folder: Path, vae: Any) -> None:
    """Refuse a folder that holds another cache, whole or not, or files of others by the names of this one's.

    Raises:
        ValueError: that says what differs.
    """
    name = repr(plan.config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {name} is a file: name a folder")
    earlier, unfinished = read_manifest(folder), read_unfinished(folder)
    shards = [folder / shard.file for shard in plan.shards if os.path.lexists(folder / shard.file)]
    if earlier is not None and earlier["fingerprint"] != plan.fingerprint:
        raise ValueError(f"{name} holds another cache, {difference(earlier['settings'], plan.settings)}: {REMEDY}")
    if earlier is None and shards:
        if unfinished is not None and unfinished["fingerprint"] != plan.fingerprint:
            reason = difference(unfinished["settings"], plan.settings)
            raise ValueError(f"{name} holds the beginning of another cache, {reason}: {REMEDY}")
        for path in shards if unfinished is None else ():
            if not is_shard(path, plan.fingerprint):
                raise ValueError(f"{name} has a file {path.name!r}, which is none of this cache: {REMEDY}")
    if os.path.lexists(folder / VAE) and not same_autoencoder(folder / VAE, vae):
        raise ValueError(f"{name} has a folder {VAE!r}, which is not this cache's autoencoder: {REMEDY}")


def prepare_folder(folder: Path, vae: Any) -> None:
    """Make the cache's folder, remove what a killed run left of its own, and save the autoencoder there.

    Raises:
        OSError: if the autoencoder cannot be written; nothing of it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in list(folder.iterdir()):
        if TEMPORARY.fullmatch(file.name):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    if (folder / VAE).exists():
        return
    temporary = folder / f".{VAE}.{secrets.token_hex(4)}.tmp"
    try:
        vae.save_pretrained(temporary)
        temporary.rename(folder / VAE)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder / VAE, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def start_folder(plan: Plan, folder: Path) -> None:
    """Note what a cache that is begun will be, so that another one is not taken for it."""
    if read_manifest(folder) is None:
        content = {"format": FORMAT, "fingerprint": plan.fingerprint, "settings": plan.settings}
        write_json(folder / UNFINISHED, content, indent=1)


def finish_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with which the cache is complete."""
    write_json(folder / MANIFEST, manifest, indent=1)
    (folder / UNFINISHED).unlink(missing_ok=True)


def read_unfinished(folder: Path) -> dict[str, Any] | None:
    """What an interrupted run noted; None if there is nothing.

    Raises:
        ValueError: if a file of that name is something else.
    """
    path = folder / UNFINISHED
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == FORMAT and found["fingerprint"]:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{str(path)!r} is not of a cache of this version: {REMEDY}")


def is_shard(path: Path, fingerprint: str) -> bool:
    """Whether a file is a whole shard of this cache."""
    try:
        header = read_header(path)
    except (OSError, ValueError):
        return False
    return (header.get("format"), header.get("fingerprint")) == (FORMAT, fingerprint)


def same_autoencoder(folder: Path, vae: Any) -> bool:
    """Whether a folder holds this autoencoder."""
    try:
        return autoencoder_hash(load_autoencoder(str(folder))) == autoencoder_hash(vae)
    except Exception:  # noqa: BLE001 (whatever cannot be loaded is not it)
        return False


def write_shard(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a shard, so that it is whole or not there.

    Raises:
        OSError: that names it, if it cannot be written.
    """
    try:
        with replaced(path) as temporary:
            save_file(tensors, temporary, {"cache": json.dumps(header, sort_keys=True)})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """The error of a part that cannot be written, as on a full disk."""
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(f"cannot write {str(path)!r}: {reason}; what is written is kept, so make room and run it again")


def kept_record(plan: Plan, shard: Shard, folder: Path, checksum: str | None) -> dict[str, Any] | None:
    """The record of a shard that an earlier run wrote; None if it is not there, not whole or not the planned one.

    Args:
        checksum: of an earlier manifest, if there is one. Without it a whole file is trusted.
    """
    path = folder / shard.file
    try:
        header = read_header(path)
    except (OSError, ValueError):
        return None
    if any(header.get(key) != value for key, value in plan.header(shard).items()):
        return None
    record = make_record(path, header)
    return record if checksum in (None, record["sha256"]) else None


def make_record(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """A shard's header with its file's name, size and checksum."""
    return {**header, "file": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path)}
