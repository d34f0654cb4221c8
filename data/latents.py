"""Reading a cache of latents: pictures that ``tarflow cache-latents`` encoded once.

A cache is a folder of safetensors shards with a ``manifest.json``; the autoencoder that made it lies in ``vae``. What
a shard has for its N pictures, all of one size: ``latent_mean`` and ``latent_std`` (N, C, h, w) of the autoencoder's
posterior, the same with ``_flipped`` of the mirrored pictures, ``label`` (N,), captions as ``caption_bytes`` with
``caption_offsets`` (N + 1,), and encoded captions as ``cond`` (rows, E) with ``cond_offsets`` (N + 1,), without the
zeros of their padding. ``null_cond`` (rows, E) is the encoded empty caption.
"""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from tarflow.data.place import MANIFEST, check_cache

#: What manifests and shards call themselves; changed whenever their layout is.
FORMAT = "tarflow latents 1"
REMEDY = "run tarflow cache-latents again: it rewrites only what is missing"


class CachedLatents(Dataset[dict[str, Any]]):
    """One split of a cache, picture by picture.

    Items are ``{"latent_mean": (C, h, w), "latent_std": (C, h, w), "caption": str, "label": int, "cond": (L, E),
    "skipped": []}``, floats in float32; caption, label and cond are there if the cache has them, and with ``flip`` also
    ``latent_mean_flipped`` and ``latent_std_flipped``. Latents are scaled by the autoencoder's own factors but not
    normalised per channel; a standard deviation of zeros is an autoencoder's that has no posterior.

    Args:
        path: the cache's folder.
        split: "train" or "validation", which may be empty.
        flip: read the mirrored pictures too.

    Attributes:
        manifest: everything that the cache tells about itself.
        shapes: (h, w) of each group of latents of one shape.
        groups: the indices of each group's items, which are consecutive.
        latents_mean, latents_std: per channel of the scaled latents of the training split.
        null_cond: the encoded empty caption (L, E), None if captions are not encoded.

    Raises:
        ValueError: if there is no such cache, or a shard is missing, cut off or of another cache.
    """

    def __init__(self, path: str | Path, split: str = "train", flip: bool = False):
        if split not in ("train", "validation"):
            raise ValueError(f"the split must be 'train' or 'validation', got {split!r}")
        self.path, self.split, self.flip = Path(path).expanduser(), split, flip
        check_cache(path)
        self.manifest = read_manifest(self.path) or {}
        if flip and not self.manifest["flip"]:
            raise ValueError(
                f"the cache {str(path)!r} has no mirrored pictures: cache with --flip true, or do not flip"
            )
        self.shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        for shard in self.shards:
            self._check(shard)
        self._firsts = [shard["first"] for shard in self.shards]
        self._length = self.manifest["pictures"][split]
        self.shapes, self.groups = groups_of(self.shards)
        self._opened: dict[int, dict[str, Tensor]] = {}
        self.null_cond: Tensor | None = None
        if self.manifest["text"] is not None:
            shard = (self.shards or self.manifest["shards"])[0]
            self.null_cond = self._padded(map_tensors(self.path / shard["file"])["null_cond"])

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.manifest["class_names"]
        return None if names is None else tuple(names)

    @property
    def has_captions(self) -> bool:
        return self.manifest["has_captions"]

    @property
    def image_size(self) -> int:
        return self.manifest["image_size"]

    @property
    def latents_mean(self) -> list[float]:
        return self.manifest["latents_mean"]

    @property
    def latents_std(self) -> list[float]:
        return self.manifest["latents_std"]

    def __len__(self) -> int:
        return self._length

    def caption(self, index: int) -> str | None:
        """The caption alone."""
        return self._caption(*self._locate(index)) if self.has_captions else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        tensors, row = self._locate(index)
        item: dict[str, Any] = {}
        for suffix in ("", "_flipped") if self.flip else ("",):
            # Copies, so that changing an item does not change what is mapped.
            mean = tensors[f"latent_mean{suffix}"][row].to(torch.float32, copy=True)
            std = tensors.get(f"latent_std{suffix}")
            std = torch.zeros_like(mean) if std is None else std[row].to(torch.float32, copy=True)
            item |= {f"latent_mean{suffix}": mean, f"latent_std{suffix}": std}
        if "caption_bytes" in tensors:
            item["caption"] = self._caption(tensors, row)
        if "label" in tensors:
            item["label"] = int(tensors["label"][row])
        if "cond" in tensors:
            start, end = tensors["cond_offsets"][row : row + 2].tolist()
            item["cond"] = self._padded(tensors["cond"][start:end])
        return {**item, "skipped": []}

    def verify(self, process: int = 0, processes: int = 1) -> None:
        """Read this process's share of the shards whole and compare their checksums.

        Raises:
            ValueError: that names the first corrupt shard.
        """
        for shard in self.shards[process::processes]:
            path = self.path / shard["file"]
            if file_hash(path) != shard["sha256"]:
                raise ValueError(f"the shard {str(path)!r} is corrupt, its checksum is not the manifest's: {REMEDY}")

    def _check(self, shard: dict[str, Any]) -> None:
        path = self.path / shard["file"]
        try:
            metadata = read_header(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"the shard {str(path)!r} cannot be used, {error}: {REMEDY}") from error
        if metadata.get("fingerprint") != self.manifest["fingerprint"]:
            raise ValueError(f"the shard {str(path)!r} belongs to another cache: {REMEDY}")
        if path.stat().st_size != shard["bytes"] or metadata["count"] != shard["count"]:
            raise ValueError(f"the shard {str(path)!r} is not the one that the manifest lists: {REMEDY}")

    def _locate(self, index: int) -> tuple[dict[str, Tensor], int]:
        """The shard of an item, and its row there."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = bisect_right(self._firsts, index) - 1
        if number not in self._opened:
            self._opened[number] = map_tensors(self.path / self.shards[number]["file"])
        return self._opened[number], index - self._firsts[number]

    @staticmethod
    def _caption(tensors: dict[str, Tensor], row: int) -> str:
        start, end = tensors["caption_offsets"][row : row + 2].tolist()
        return bytes(tensors["caption_bytes"][start:end].numpy()).decode("utf-8")

    def _padded(self, cond: Tensor) -> Tensor:
        """Encoded captions (rows, E) with the zeros that stand for padding: (L, E) float32."""
        padded = torch.zeros(self.manifest["text"]["max_length"], cond.shape[1])
        padded[: len(cond)] = cond
        return padded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a spawned process maps the shards anew


def map_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard. They are mapped: only what is looked at is read, none is held in memory."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)


def groups_of(shards: list[dict[str, Any]]) -> tuple[list[tuple[int, int]], list[range]]:
    """Latent shapes of consecutive shards, and the range of items of each."""
    shapes: list[tuple[int, int]] = []
    groups: list[range] = []
    for shard in shards:
        shape, end = tuple(shard["shape"]), shard["first"] + shard["count"]
        if shapes and shapes[-1] == shape:
            groups[-1] = range(groups[-1].start, end)
        else:
            shapes.append(shape)
            groups.append(range(shard["first"], end))
    return shapes, groups


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache; None if the folder has none.

    Raises:
        ValueError: if it is none of this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no manifest of a latent cache") from error
    if found != FORMAT:
        raise ValueError(f"{str(path)!r} has the format {found!r}, expected {FORMAT!r}: make the cache anew")
    return manifest


def read_header(path: Path) -> dict[str, Any]:
    """What a shard tells about itself; {} for a safetensors file of something else.

    Raises:
        ValueError: if it is no whole safetensors file.
        OSError: if it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 2**27)))
        # One key, as safetensors writes several in any order, and a shard made again is to be the same.
        found = json.loads(header.pop("__metadata__", {}).get("cache", "{}"))
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is no safetensors file") from error
    if path.stat().st_size != 8 + length + end:
        raise ValueError(f"it has {path.stat().st_size} bytes instead of {8 + length + end}")
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
