"""Where on this machine things are kept that can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """This user's folder for the project's caches, which need not exist yet.

    ``TARFLOW_CACHE`` names it; else it is ``tarflow`` in ``XDG_CACHE_HOME`` or in the place that the system has for such
    things: ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.
    """
    if own := os.environ.get("TARFLOW_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "tarflow"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "tarflow" / "Cache"
    home = Path(os.path.expanduser("~"))
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "tarflow"
