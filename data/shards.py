"""The files of a cache of latents: its manifest and its shards, as they are on disk.

A cache is a folder of safetensors shards with a ``manifest.json``; the autoencoder that made it lies in ``vae``. What
a shard has for its N pictures, all of one size: ``latent_mean`` and ``latent_std`` (N, C, h, w) of the autoencoder's
posterior, the same with ``_flipped`` of the mirrored pictures, ``label`` (N,), captions as ``caption_bytes`` with
``caption_offsets`` (N + 1,), and encoded captions as ``cond`` (rows, E) with ``cond_offsets`` (N + 1,), without the
zeros of their padding. ``null_cond`` (rows, E) is the encoded empty caption.
"""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from torch import Tensor
from xxhash import xxh3_128

from tarflow.common.folders import Folder, LocalFolder, checksums_of_file, hash_of_file, open_folder
from tarflow.data.place import MANIFEST

#: What manifests and shards call themselves; changed whenever their layout is.
FORMAT = "tarflow latents 1"
REMEDY = "run tarflow cache-latents again: it rewrites only what is missing"


def as_folder(folder: Folder | Path | str) -> Folder:
    return open_folder(folder) if isinstance(folder, Path | str) else folder


def map_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard. They are mapped: only what is looked at is read, none is held in memory."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)


def read_manifest(folder: Folder | Path | str) -> dict[str, Any] | None:
    """The manifest of a cache; None if the folder has none.

    Raises:
        ValueError: if it is none of this format, or cannot be read.
    """
    place = as_folder(folder)
    name = repr(place.place(MANIFEST))
    try:
        content = place.read(MANIFEST)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    if content is None:
        return None
    try:
        manifest = json.loads(content)
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is no manifest of a latent cache") from error
    if found != FORMAT:
        raise ValueError(f"{name} has the format {found!r}, expected {FORMAT!r}: make the cache anew")
    return manifest


def read_header(path: Path | str, folder: Folder | None = None) -> dict[str, Any]:
    """What a shard tells about itself; {} for a safetensors file of something else.

    Args:
        path: of the shard, or its name in ``folder``.

    Raises:
        ValueError: if it is no whole safetensors file.
        OSError: if it cannot be opened.
    """
    place, name = (LocalFolder(Path(path).parent), Path(path).name) if folder is None else (folder, str(path))
    size = place.size(name)
    try:
        with place.open(name) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 2**27)))
        # One key, as safetensors writes several in any order, and a shard made again is to be the same.
        found = json.loads(header.pop("__metadata__", {}).get("cache", "{}"))
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is no safetensors file") from error
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    return found


def checksums(path: Path | str, folder: Folder | None = None) -> dict[str, str]:
    """What a shard's record has of its content: SHA-256 for all comparisons but one; XXH3, which takes a tenth of the time,
    for shards that are fetched while training waits for them. Arguments as of `file_hash`."""
    with opened(path, folder) as file:
        return dict(zip(("sha256", "xxh3_128"), checksums_of_file(file, sha256, xxh3_128), strict=True))


def is_intact(path: Path, record: dict[str, Any]) -> bool:
    """Whether a shard's copy has the checksum of its record; of older ones SHA-256 is compared."""
    if "xxh3_128" not in record:
        return file_hash(path) == record["sha256"]
    with opened(path) as file:
        return checksums_of_file(file, xxh3_128) == [record["xxh3_128"]]


def file_hash(path: Path | str, folder: Folder | None = None) -> str:
    """SHA-256 of a file, or of the file of this name in ``folder``."""
    with opened(path, folder) as file:
        return hash_of_file(file)


def opened(path: Path | str, folder: Folder | None = None) -> IO[bytes]:
    """A file for reading, by its path or by its name in ``folder``."""
    return Path(path).open("rb") if folder is None else folder.open(str(path))
