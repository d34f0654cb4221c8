"""How a training ends before its last step: at SIGTERM, which schedulers send, and at Ctrl-C (SIGINT)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds within which a second Ctrl-C is the same one, which reached a process and its launcher.
SAME = 2.0


class Stopped(BaseException):
    """A signal in work that may end at any instant; "name" is the signal's."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class StopRequest:
    """Notices SIGTERM and SIGINT. Cluster schedulers send SIGTERM before they end a job, some to a process and its
    launcher, so that it arrives twice. A second SIGINT, some seconds after the first, raises KeyboardInterrupt.

    Attributes:
        received: the first signal's name, "" if there was none.
    """

    def __init__(self) -> None:
        self.received = ""
        self._when, self._at_once = 0.0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not handle signals
            self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self._when > SAME:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = signal.Signals(number).name, now
            if self._at_once:
                raise Stopped(self.received)

    @contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """Work that a signal ends with `Stopped`, if that is allowed, as nothing is lost then."""
        if allowed and self.received:
            raise Stopped(self.received)
        self._at_once = allowed
        try:
            yield
        finally:
            self._at_once = False

    def agreed(self, accelerator: Accelerator) -> str:
        """The name of a signal that any process has noticed, "" if none has; the same answer on all of them."""
        if accelerator.num_processes == 1:
            return self.received
        number = signal.Signals[self.received] if self.received else 0
        counts = torch.tensor([float(number == known) for known in SIGNALS], device=accelerator.device)
        counts = accelerator.reduce(counts, "sum").tolist()
        return next((known.name for known, count in zip(SIGNALS, counts, strict=True) if count), "")


def exit_status(metrics: dict[str, Any]) -> int:
    """The exit status of a training's command: 130 after Ctrl-C."""
    return 130 if metrics.get("stopped") == "SIGINT" else 0


@contextmanager
def launched_process() -> Iterator[None]:
    """End a process that a launcher started with this block, of which nothing is left to be done.

    FSDP's meshes and caches keep process groups, and so their threads, alive after they are destroyed. Python's and the
    C++ library's ends take the objects away while these threads run, which now and then aborts a process that has done
    all its work ("terminate called without an active exception"). So nothing more is run.
    """
    status: Any = 0
    try:
        yield
    except SystemExit as error:
        if "LOCAL_RANK" not in os.environ:
            raise
        status = error.code
    if "LOCAL_RANK" in os.environ:
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))
