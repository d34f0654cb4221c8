"""One cache of latents, opened: its manifest, and the shards of a split, where they are or as local copies."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from tarflow.common.folders import UrlFolder, open_folder
from tarflow.data.place import MANIFEST, no_cache
from tarflow.data.shard_store import MissingShardError, ShardStore
from tarflow.data.shards import REMEDY, file_hash, map_tensors, read_header, read_manifest

#: Folder of the autoencoder in a cache.
VAE = "vae"


class LatentCache:
    """A cache's shards of one split.

    Args:
        path: the cache's folder, or its URL.
        split: "train" or "validation", which may be empty.
        limit: bytes of local copies of shards that lie at a URL.
        verify: of these, compare checksums when they arrive.
        skip: go on without shards that cannot be read.

    Attributes:
        manifest: everything that the cache tells about itself.
        shards: their records in the manifest.
        missing: numbers of shards that cannot be read, with what is the matter; of ``skip`` alone.

    Raises:
        ValueError: if there is no such cache, or a shard is missing, cut off or of another cache.
    """

    def __init__(self, path: str | Path, split: str, limit: int, verify: bool = True, skip: bool = False):
        self.folder, self.skip = open_folder(path), skip
        self.manifest = read_manifest(self.folder) or {}
        if not self.manifest:
            raise no_cache(path)
        self.shards: list[dict[str, Any]] = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        for shard in self.manifest["shards"]:
            if shard["file"].startswith(".") or "/" in shard["file"] or "\\" in shard["file"]:
                raise ValueError(
                    f"the manifest of the cache {self.name!r} names {shard['file']!r}, which is no file in it"
                )
        self.missing: dict[int, str] = {}
        self.store: ShardStore | None = None
        self._opened: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._most: int | None = None
        self._lock = Lock()  # a thread may read ahead
        if isinstance(self.folder, UrlFolder):
            self.store = ShardStore(self.folder, self.manifest["fingerprint"], limit, verify)
            self._check_listing(self.folder)
        else:
            for shard in self.shards:
                self._check(shard)

    @property
    def name(self) -> str:
        return self.folder.name

    def keep_open(self, most: int) -> None:
        """Hold at most so many copies open: one that was removed keeps its place on the disk until then."""
        self._most = None if self.store is None else most

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped.

        Raises:
            MissingShardError: if it lies at a URL and cannot be fetched; at once where that is known.
        """
        with self._lock:
            return self._tensors(number)

    def _tensors(self, number: int) -> dict[str, Tensor]:
        if number in self.missing:
            raise MissingShardError(self.missing[number])
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        shard = self.shards[number]
        try:
            tensors = map_tensors(self._file(shard)) if self.store is None else self.store.open(shard)
        except MissingShardError as error:
            reason = str(error)
            if self._is_changed():
                reason += (
                    "; the cache's manifest is another one than at the start, as tarflow cache-latents writes when it goes on: "
                    "start again"
                )
            if self.skip:
                self.missing[number] = reason
            raise MissingShardError(reason) from error
        self._opened[number] = tensors
        while self._most is not None and len(self._opened) > self._most:
            self._opened.popitem(last=False)
        return tensors

    def _is_changed(self) -> bool:
        """Whether the cache has been gone on with since it was opened."""
        with suppress(OSError, ValueError):
            return read_manifest(self.folder) not in (None, self.manifest)
        return False

    def close(self) -> None:
        """End the threads that fetch shards."""
        if self.store is not None:
            self.store.close()

    def any_shard(self) -> dict[str, Tensor]:
        """The tensors of a shard of any split."""
        shard = self.manifest["shards"][0]
        return map_tensors(self._file(shard)) if self.store is None else self.store.open(shard)

    def autoencoder_folder(self) -> Path:
        """The autoencoder's folder on this machine; from a URL it is copied.

        Raises:
            OSError: if it cannot be.
        """
        if not isinstance(self.folder, UrlFolder):
            return self.folder.local / VAE
        assert self.store is not None
        return self.store.folder_copy(VAE)

    def verify(self, process: int, processes: int) -> None:
        """Read this process's share of the shards whole and compare their checksums; copies are compared as they arrive.

        Raises:
            ValueError: that names the first corrupt shard.
        """
        for shard in self.shards[process::processes] if self.store is None else ():
            path = self._file(shard)
            if file_hash(path) != shard["sha256"]:
                raise ValueError(f"the shard {str(path)!r} is corrupt, its checksum is not the manifest's: {REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_opened": OrderedDict()}  # a spawned process maps the shards anew
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": Lock()}

    def _file(self, shard: dict[str, Any]) -> Path:
        assert self.folder.local is not None
        return self.folder.local / shard["file"]

    def _check(self, shard: dict[str, Any]) -> None:
        path = self._file(shard)
        try:
            metadata = read_header(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"the shard {str(path)!r} cannot be used, {error}: {REMEDY}") from error
        if metadata.get("fingerprint") != self.manifest["fingerprint"]:
            raise ValueError(f"the shard {str(path)!r} belongs to another cache: {REMEDY}")
        if path.stat().st_size != shard["bytes"] or metadata["count"] != shard["count"]:
            raise ValueError(f"the shard {str(path)!r} is not the one that the manifest lists: {REMEDY}")

    def _check_listing(self, folder: UrlFolder) -> None:
        """Whether all shards are there, by one listing of names and sizes, where the file system tells them."""
        try:
            sizes = folder.sizes()
        except OSError:  # such as web servers without one
            return
        if sizes.get(MANIFEST) is None:
            return
        for number, shard in enumerate(self.shards):
            name, size = shard["file"], sizes.get(shard["file"])
            if size == shard["bytes"]:
                continue
            what = f"has {size} bytes instead of {shard['bytes']}" if name in sizes else "is not there"
            sentence = f"the shard {folder.place(name)!r} {what}: {REMEDY}"
            if not self.skip:
                raise ValueError(f"{sentence}, or go on without it by data.on_error skip")
            self.missing[number] = sentence
