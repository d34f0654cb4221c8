"""An iterator that runs ahead in a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
#: Seconds after which a thread that waits looks whether it is still wanted.
LOOK = 0.2


class Ahead(Generic[Value]):
    """The values of an iterator, of which so many are made before they are asked for; its errors come in their turn.

    Args:
        values: the iterator, which is then the thread's alone.
        count: how many wait at most.
    """

    def __init__(self, values: Iterator[Value], count: int):
        self._queue: Queue[tuple[str, Any]] = Queue(count)
        self._closed = Event()
        self._thread = Thread(target=self._run, args=(values,), daemon=True)
        self._thread.start()

    def __next__(self) -> Value:
        while True:
            try:
                kind, value = self._queue.get(timeout=LOOK)
                break
            except Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise StopIteration from None
        if kind == "error":
            self._put(kind, value)  # to be told again
            raise value
        found: Value = value
        return found

    def close(self) -> None:
        """Have the thread end, and its values let go."""
        self._closed.set()
        with suppress(Empty):  # a thread that waits for room has some at once
            while True:
                self._queue.get_nowait()

    def wait(self, end: float) -> None:
        """Wait until the thread has ended, or until the monotonic clock shows ``end``."""
        self._thread.join(max(0.0, end - time.monotonic()))

    def _run(self, values: Iterator[Value]) -> None:
        try:
            for value in values:
                if not self._put("value", value):
                    return
        except Exception as error:  # noqa: BLE001 (whoever asks for the value is to see it)
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((kind, value), timeout=LOOK)
                return not self._closed.is_set()  # closing makes room
            except Full:
                continue
        return False
