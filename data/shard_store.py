"""Local copies of the shards of a cache that lies at a URL: fetched when they are needed or before, at most so many bytes."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from zlib import crc32

from filelock import FileLock
from torch import Tensor

from tarflow.common.cache import cache_folder
from tarflow.common.folders import UrlFolder
from tarflow.data.shards import is_intact, map_tensors

#: Seconds before each further try to fetch a shard.
WAITS = (1.0, 2.0, 4.0)
#: Threads that fetch before shards are needed; locks, of which each is for many shards.
FETCHERS, LOCKS = 4, 64
#: Seconds between two looks at a lock that another holds.
LOOK = 0.002
#: Seconds that closing waits for what is being fetched.
PATIENCE = 5.0
#: A folder of copies; whatever else lies beside is not ours.
COPIES = re.compile(r"[0-9a-f]{16}")
#: A copy that is being made: its size, which counts before it has it. One that is so old (s) is of a killed process.
ARRIVING, FORGOTTEN = re.compile(r"\..*\.(\d+)\.[0-9a-f]{8}\.tmp"), 3600.0


class MissingShardError(ValueError):
    """A shard that could not be fetched, also not after waiting."""


#: What the disk of the copies says, and not the place of the cache: full, or not to be written.
OWN_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ShardStore:
    """Copies of one cache's shards in this machine's cache folder, which all processes and runs share.

    Where they would be more than ``limit`` bytes, of all caches together, those that were needed longest ago are
    removed. On systems that let a file be removed while it is mapped, whoever reads it is not disturbed.

    Args:
        folder: of the cache.
        fingerprint: of its manifest.
        limit: bytes of all copies.
        verify: compare checksums of what has arrived; its size is compared in any case.
    """

    def __init__(self, folder: UrlFolder, fingerprint: str, limit: int, verify: bool = True):
        self.folder, self.limit, self.verify = folder, limit, verify
        self.root = cache_folder() / "shards"
        self.path = self.root / sha256(f"{folder.name}\n{fingerprint}".encode()).hexdigest()[:16]
        self._queue: SimpleQueue[dict[str, Any] | None] | None = None
        self._threads: list[Thread] = []
        self._process = 0

    def open(self, shard: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of a shard, by its record in the manifest, mapped.

        Raises:
            MissingShardError: that names it, if it cannot be fetched after three more tries with waiting.
        """
        for _ in range(10):
            path = self.fetched(shard, WAITS)
            with suppress(FileNotFoundError):  # another process may remove it at this very instant
                return map_tensors(path)
        raise MissingShardError(
            f"the copy of the shard {self.folder.place(shard['file'])!r} is removed as soon as it is there: several runs "
            "share data.cache_gb; raise it, or give each a TARFLOW_CACHE of its own"
        )

    def fetched(self, shard: dict[str, Any], waits: tuple[float, ...] = ()) -> Path:
        """The path of a shard's copy, which is made if it is not there.

        Args:
            shard: its record in the manifest.
            waits: seconds before each further try.

        Raises:
            MissingShardError: if no try succeeds.
        """
        path = self.path / shard["file"]
        if self._is_here(path, shard):
            return path
        self.path.mkdir(parents=True, exist_ok=True)
        reason = ""
        for wait in (0.0, *waits):
            time.sleep(wait)
            with lock(self.path / f".lock-{crc32(shard['file'].encode()) % LOCKS}"):
                if self._is_here(path, shard):
                    return path
                try:
                    self._fetch(shard, path)
                    return path
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in OWN_FAULTS:
                        raise OSError(
                            f"a copy of the shard {shard['file']!r} cannot be written to {str(self.path)!r}, {error.strerror}: "
                            "make room there, set TARFLOW_CACHE to another folder, or lower data.cache_gb"
                        ) from error
                    reason = getattr(error, "strerror", None) or str(error)
        tries = f" (tried {1 + len(waits)} times in {sum(waits):g} seconds)" if waits else ""
        raise MissingShardError(
            f"the shard {self.folder.place(shard['file'])!r} cannot be read, {reason}{tries}: mend the place, or go on "
            "without it by data.on_error skip"
        )

    def folder_copy(self, name: str) -> Path:
        """The path of a copy of a folder with its files, which is made, whole or not at all, if it is not there.

        Raises:
            OSError: if it cannot be.
        """
        target = self.path / name
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path / f".lock-{name}"):  # of several processes one fetches it
            if not target.is_dir():
                for left in self.path.glob(f".{name}.*.tmp"):  # of a killed process
                    shutil.rmtree(left, ignore_errors=True)
                temporary = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
                try:
                    self.folder.fetch_folder(name, temporary)
                    temporary.rename(target)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        return target

    def prefetch(self, shards: Iterable[dict[str, Any]]) -> None:
        """Have shards fetched in this order while other things are done; what fails is tried again when it is needed."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._queue = os.getpid(), SimpleQueue()
            self._threads = [Thread(target=self._work, args=(self._queue,), daemon=True) for _ in range(FETCHERS)]
            for thread in self._threads:
                thread.start()
        assert self._queue is not None
        for shard in shards:
            self._queue.put(shard)

    def close(self) -> None:
        """End the threads that fetch; what they are in the middle of is waited for, but not long."""
        if self._queue is None or self._process != os.getpid():
            return
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._queue, self._threads, self._process = None, [], 0

    def _work(self, queue: SimpleQueue[dict[str, Any] | None]) -> None:
        while (shard := queue.get()) is not None:
            with suppress(MissingShardError):
                self.fetched(shard)

    def _is_here(self, path: Path, shard: dict[str, Any]) -> bool:
        try:
            if path.stat().st_size != shard["bytes"]:
                return False
            os.utime(path)  # those that were needed longest ago go first
        except OSError:
            return False
        return True

    def _fetch(self, shard: dict[str, Any], path: Path) -> None:
        """Make a copy, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{shard['bytes']}.{secrets.token_hex(4)}.tmp")
        make_room(self.root, self.limit - shard["bytes"], temporary)
        try:
            self.folder.fetch(shard["file"], temporary)
            size = temporary.stat().st_size
            if size != shard["bytes"]:
                raise ValueError(f"it has {size} bytes instead of {shard['bytes']}")
            if self.verify and not is_intact(temporary, shard):
                raise ValueError("its checksum is not the manifest's")
            with lock(self.root / ".lock"):  # who counts copies would find it under neither name
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_queue": None, "_threads": [], "_process": 0}


def lock(path: Path) -> AbstractContextManager[Any]:
    """A lock among threads and processes. Who waits for it looks often: training waits for what is fetched."""
    return FileLock(path).acquire(poll_interval=LOOK)


def make_room(root: Path, limit: int, arriving: Path) -> None:
    """Remove the copies that were needed longest ago until at most ``limit`` bytes are left, and note one that arrives.

    Args:
        root: folder of the folders of copies.
        limit: bytes.
        arriving: path of what arrives, with its size in its name.
    """
    with lock(root / ".lock"):
        found: list[tuple[float, int, Path]] = []
        total = 0
        for path in (path for folder in root.iterdir() if COPIES.fullmatch(folder.name) for path in folder.glob("*")):
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            part = ARRIVING.fullmatch(path.name)
            if part and time.time() - about.st_mtime > FORGOTTEN:
                path.unlink(missing_ok=True)
            elif part:
                total += int(part[1])
            elif path.suffix == ".safetensors":
                found.append((about.st_mtime, about.st_size, path))
                total += about.st_size
        for _, size, path in sorted(found):
            if total <= limit:
                break
            with suppress(OSError):  # where a file that is read cannot be removed
                path.unlink()
                total -= size
        arriving.touch()
