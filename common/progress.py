"""Progress bars that do not fill logs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

#: Seconds between the lines of a bar that is not on a terminal.
INTERVAL = 30.0


class LineProgress(plain_tqdm):
    """Progress as lines of a log, one every `INTERVAL` seconds; work that takes less time has none."""

    _shown: float | None = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "mininterval": INTERVAL, "leave": False, "dynamic_ncols": False})

    def refresh(self, *arguments: Any, **options: Any) -> bool | None:
        """A line, if it is time for one."""
        if self.disable:
            return None
        now = self._time()
        if self._shown is None:
            self._shown = now
        if now - self._shown < INTERVAL:
            return None
        self._shown = now
        return super().refresh(*arguments, **options)

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Lines of a log stay."""

    def close(self) -> None:
        """End without a further line."""
        self.delay = math.inf  # bars that were not shown yet leave nothing behind
        super().close()

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes a bar's text, here with a line's end."""

        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return write


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> plain_tqdm:
    """A progress bar, as `tqdm` on terminals and in notebooks; elsewhere `LineProgress`.

    Args:
        iterable: as of ``tqdm``.
        options: those of ``tqdm``.
    """
    file = options.get("file") or sys.stderr
    on_terminal = hasattr(file, "isatty") and file.isatty()
    kind = tqdm if on_terminal or is_notebook() else LineProgress
    return kind(iterable, **options)


def is_notebook() -> bool:
    """Whether bars are widgets here."""
    return any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)


def announce(text: str) -> None:
    """Say what will take long, before it begins, where it does not mix with results: on the standard error."""
    print(text, file=sys.stderr, flush=True)


def write_line(text: str) -> None:
    """Write a line to the standard output, above the bars of a terminal."""
    tqdm.write(text)
