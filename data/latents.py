"""Reading caches of latents: pictures that ``tarflow cache-latents`` encoded once. `tarflow.data.shards` has the format."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tarflow.data.config import DataConfig
from tarflow.data.joining import check_alike, groups_of, pieces_of, pooled_statistics, streams_of
from tarflow.data.latent_cache import LatentCache
from tarflow.data.place import paths_of
from tarflow.data.shard_store import MissingShardError
from tarflow.data.subset import evenly

#: Shards that are mixed at a time where nothing else is said, of caches at a URL.
MIXED_SHARDS = 16
#: Bytes of a GB.
GB = 10**9


class CachedLatents(Dataset[dict[str, Any]]):
    """One split of a cache, or of several, picture by picture or in batches.

    Items are ``{"latent_mean": (C, h, w), "latent_std": (C, h, w), "caption": str, "label": int, "cond": (L, E),
    "skipped": []}``, floats in float32; caption, label and cond are there if the cache has them, and with ``flip`` also
    ``latent_mean_flipped`` and ``latent_std_flipped``. Latents are scaled by the autoencoder's own factors but not
    normalised per channel; a standard deviation of zeros is an autoencoder's that has no posterior. "skipped" names
    shards that could not be read, for which others stand.

    Args:
        path: the cache's folder or URL, or several of caches by one autoencoder.
        split: "train" or "validation", which may be empty.
        flip: read the mirrored pictures too.
        weights, shuffle_shards, cache_gb, verify, on_error: as `DataConfig` has them.

    Attributes:
        caches: each of them, opened.
        manifest: everything that the (first) cache tells about itself.
        shapes: (h, w) of each group of latents of one shape.
        groups: the indices of each group's items, which are consecutive.
        mixed: how many shards are mixed at a time, 0 for all.
        streams: what is gone through in an order of its own.
        batches_ahead: how many a thread may gather while training computes.
        latents_mean, latents_std: per channel of the scaled latents of the training split.
        null_cond: the encoded empty caption (L, E), None if captions are not encoded.

    Raises:
        ValueError: if there is no such cache, a shard is missing, cut off or of another cache, the caches do not fit
            together, or ``cache_gb`` is less than what is mixed and read ahead.
    """

    batches_ahead = 2

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        split: str = "train",
        flip: bool = False,
        weights: Sequence[float] | None = None,
        shuffle_shards: int | None = None,
        cache_gb: float = DataConfig.cache_gb,
        verify: bool = True,
        on_error: str = "raise",
    ):
        if split not in ("train", "validation"):
            raise ValueError(f"the split must be 'train' or 'validation', got {split!r}")
        paths = [path] if isinstance(path, str | Path) else list(path)
        self.split, self.flip, self.weights = split, flip, weights
        limit = int(cache_gb * GB)
        self.caches = [LatentCache(one, split, limit, verify, on_error == "skip") for one in paths]
        check_alike(self.caches)
        for cache in self.caches:
            if flip and not cache.manifest["flip"]:
                raise ValueError(
                    f"the cache {cache.name!r} has no mirrored pictures: cache with --flip true, or do not flip"
                )
        self.manifest = self.caches[0].manifest
        self.remote = any(cache.store is not None for cache in self.caches)
        self.mixed = (MIXED_SHARDS if self.remote else 0) if shuffle_shards is None else shuffle_shards
        self._pieces = pieces_of(self.caches)
        self._firsts = [0, *accumulate(piece.count for piece in self._pieces)]
        self._length = self._firsts.pop()
        self.shapes, self.groups = groups_of(self._pieces)
        self.streams = streams_of(self._pieces, self._firsts, self.groups, weights)
        if self.remote:
            self._check_room(cache_gb)
        for cache in self.caches:
            cache.keep_open(self.mixed * max(1, len(self.streams)) or len(cache.shards))
        self._announced: dict[int, None] = {}
        self.latents_mean, self.latents_std = pooled_statistics(self.caches, weights)
        self.null_cond: Tensor | None = None
        if self.manifest["text"] is not None:
            shard = self._tensors(0)[0] if self._pieces else self.caches[0].any_shard()
            self.null_cond = self._padded(shard["null_cond"])

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
    def fingerprints(self) -> list[str]:
        """Each cache's hash of what is in it."""
        return [cache.manifest["fingerprint"] for cache in self.caches]

    @property
    def counts(self) -> list[int]:
        """How many pictures of the split each cache has."""
        return [sum(shard["count"] for shard in cache.shards) for cache in self.caches]

    @property
    def order(self) -> dict[str, Any] | None:
        """What decides the order of pictures beside the seed; None where all pictures of one cache are mixed."""
        if not self.mixed and self.weights is None and len(self.caches) == 1:
            return None
        weights = None if self.weights is None else list(self.weights)
        about = {"caches": self.fingerprints, "weights": weights, "shuffle_shards": self.mixed}
        return {**about, "pictures": self.counts}

    def about(self) -> list[str]:
        """A line for each of several caches: what it is, and its share of what is trained on."""
        lines = []
        for number, cache in enumerate(self.caches) if len(self.caches) > 1 else ():
            count = sum(shard["count"] for shard in cache.shards)
            share = count / max(1, self._length)
            if self.weights is not None:
                share = sum(s.share for s in self.streams if self._pieces[s.places[0]].cache == number)
            lines.append(
                f"cache {cache.name} ({self.fingerprints[number][:8]}): {count:,} pictures, {share:.1%} of each pass"
            )
        return lines

    @property
    def ahead(self) -> int:
        """How many pictures before they are needed their shards are fetched; 0 for caches on this machine."""
        if not self.remote or not self.mixed or not self._pieces:
            return 0
        # Not all of what is mixed next: batches that are being read are still of what was mixed before.
        return 3 * self.mixed * len(self.streams) * self._length // (4 * len(self._pieces))

    def __len__(self) -> int:
        return self._length

    def caption(self, index: int) -> str | None:
        """The caption alone."""
        if not self.has_captions:
            return None
        place, row = self._locate(index)
        tensors, _ = self._tensors(place)
        return caption_of(tensors, row % len(tensors["latent_mean"]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        item = {key: value[0] for key, value in batch.items() if key != "skipped"}
        if "label" in item:
            item["label"] = int(item["label"])
        return {**item, "skipped": batch["skipped"]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch, as `tarflow.data.images.collate` makes it of items of one shape."""
        numbers = np.asarray(indices)
        if not (numbers >= 0).all() or not (numbers < self._length).all():
            raise IndexError(f"items are numbered from 0 to {self._length - 1}, got {indices}")
        places = np.searchsorted(self._firsts, numbers, side="right") - 1
        rows_of = numbers - np.asarray(self._firsts)[places]
        by_shard = {int(place): np.flatnonzero(places == place) for place in dict.fromkeys(places.tolist())}
        batch: dict[str, Any] = {}
        skipped: list[str] = []
        parts: dict[str, list[Tensor]] = {}
        captions = np.empty(len(indices), dtype=object)
        conds: Tensor | None = None
        for place, positions in by_shard.items():
            tensors, message = self._tensors(place)
            if message:
                skipped.append(message)
            count = len(tensors["latent_mean"])
            rows = torch.from_numpy(rows_of[positions] % count)
            for key in (*self._latent_keys(), "label"):
                if key in tensors:  # much cheaper than indexing by brackets
                    parts.setdefault(key, []).append(tensors[key].index_select(0, rows))
            if "caption_bytes" in tensors:
                for position, row in zip(positions, rows.tolist(), strict=True):
                    captions[position] = caption_of(tensors, row)
            if "cond" in tensors:
                conds = self._fill_conds(conds, len(indices), tensors, positions.tolist(), rows.tolist())
        order = torch.from_numpy(np.concatenate(list(by_shard.values()))).argsort()
        for key in self._latent_keys():
            if key in parts:
                batch[key] = torch.cat(parts[key]).index_select(0, order).float()
            else:
                batch[key] = torch.zeros_like(batch[key.replace("_std", "_mean")])
        if captions[0] is not None:
            batch["caption"] = captions.tolist()
        if "label" in parts:
            batch["label"] = torch.cat(parts["label"]).index_select(0, order).long()
        if conds is not None:
            batch["cond"] = conds
        return {**batch, "skipped": skipped}

    def expect(self, indices: Iterable[int]) -> None:
        """Have the shards of items that come next fetched in the background."""
        places = {bisect_right(self._firsts, index) - 1: None for index in indices}
        for place in places:
            if place in self._announced:
                continue
            self._announced[place] = None
            piece = self._pieces[place]
            cache = self.caches[piece.cache]
            if cache.store is not None and piece.number not in cache.missing:
                cache.store.prefetch([cache.shards[piece.number]])
        # Those of the next pass are announced again.
        while len(self._announced) > 2 * self.mixed * max(1, len(self.streams)):
            self._announced.pop(next(iter(self._announced)))

    def close(self) -> None:
        """End what fetches in the background; it begins again when something is expected."""
        self._announced.clear()
        for cache in self.caches:
            cache.close()

    def spread(self, group: range, count: int) -> list[int]:
        """``count`` items of a group at equal distances; of caches at a URL, from no more shards than are mixed."""
        first, last = (bisect_right(self._firsts, index) - 1 for index in (group.start, group.stop - 1))
        if not self.remote or not self.mixed or last - first < self.mixed:
            return [group[place] for place in evenly(len(group), count)]
        chosen = [first + place for place in evenly(last - first + 1, self.mixed)]
        items = [self._firsts[place] + row for place in chosen for row in range(self._pieces[place].count)]
        return [items[place] for place in evenly(len(items), min(count, len(items)))]

    def verify(self, process: int = 0, processes: int = 1) -> None:
        """Read this process's share of the shards on this machine whole and compare their checksums.

        Raises:
            ValueError: that names the first corrupt shard.
        """
        for cache in self.caches:
            cache.verify(process, processes)

    def autoencoder_folder(self) -> Path:
        """The autoencoder's folder on this machine."""
        return self.caches[0].autoencoder_folder()

    def _check_room(self, cache_gb: float) -> None:
        """Refuse room for copies that is less than what is mixed, and fetched to be mixed next."""
        mixed, needed = self.mixed if self.split == "train" else 1, 0
        for stream in self.streams:
            pieces = [self._pieces[place] for place in stream.places]
            caches = [self.caches[piece.cache] for piece in pieces]
            sizes = [
                cache.shards[piece.number]["bytes"]
                for cache, piece in zip(caches, pieces, strict=True)
                if cache.store is not None
            ]
            needed += sum(sorted(sizes, reverse=True)[: 2 * mixed or None])
        if needed > cache_gb * GB:
            raise ValueError(
                f"data.cache_gb is {cache_gb:g}, but the shards that are mixed, and those fetched to be mixed next, take "
                f"{needed / GB:.3g}: raise it, or lower data.shuffle_shards ({self.mixed}, 0 is all)"
            )

    def _latent_keys(self) -> list[str]:
        return [f"latent_{kind}{suffix}" for suffix in ("", "_flipped")[: 1 + self.flip] for kind in ("mean", "std")]

    def _locate(self, index: int) -> tuple[int, int]:
        """The piece of an item, and its row there."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        place = bisect_right(self._firsts, index) - 1
        return place, index - self._firsts[place]

    def _tensors(self, place: int) -> tuple[dict[str, Tensor], str]:
        """The tensors of a piece, or of the next of its shape that can be read, and then why."""
        piece = self._pieces[place]
        try:
            return self.caches[piece.cache].tensors(piece.number), ""
        except MissingShardError as error:
            if not self.caches[piece.cache].skip:
                raise
            reason = str(error)
        alike = [other for other, found in enumerate(self._pieces) if found.shape == piece.shape]
        start = alike.index(place)
        for other in alike[start + 1 :] + alike[:start]:
            piece = self._pieces[other]
            try:
                return self.caches[piece.cache].tensors(piece.number), f"{reason}; others stand for its pictures"
            except MissingShardError:
                continue
        raise MissingShardError(reason)

    def _fill_conds(
        self, conds: Tensor | None, size: int, tensors: dict[str, Tensor], positions: list[int], rows: list[int]
    ) -> Tensor:
        offsets = tensors["cond_offsets"].numpy()
        if conds is None:
            conds = torch.zeros(size, self.manifest["text"]["max_length"], tensors["cond"].shape[1])
        for position, row in zip(positions, rows, strict=True):
            found = tensors["cond"][offsets[row] : offsets[row + 1]]
            conds[position, : len(found)] = found
        return conds

    def _padded(self, cond: Tensor) -> Tensor:
        """Encoded captions (rows, E) with the zeros that stand for padding: (L, E) float32."""
        padded = torch.zeros(self.manifest["text"]["max_length"], cond.shape[1])
        padded[: len(cond)] = cond
        return padded


def open_latents(config: DataConfig, split: str) -> CachedLatents:
    """The caches that a configuration names.

    Raises:
        ValueError: see `CachedLatents`.
    """
    return CachedLatents(
        paths_of(config),
        split,
        flip=config.flip and split == "train",
        weights=config.weights,
        shuffle_shards=config.shuffle_shards,
        cache_gb=config.cache_gb,
        verify=config.verify,
        on_error=config.on_error,
    )


def caption_of(tensors: dict[str, Tensor], row: int) -> str:
    """A caption of a shard."""
    start, end = tensors["caption_offsets"][row : row + 2].tolist()
    return bytes(tensors["caption_bytes"][start:end].numpy()).decode("utf-8")
