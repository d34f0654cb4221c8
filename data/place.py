"""Whether data is where a configuration says, asked before the libraries that read it are loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tarflow.common.folders import check_url, local_path
from tarflow.data.config import DataConfig

#: What a cache of latents holds, in its folder.
MANIFEST = "manifest.json"


def status_of(path: str | Path) -> os.stat_result:
    """The status of the file or folder that a data path names.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    try:
        return Path(path).expanduser().stat()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ValueError(
            f"the data path {str(path)!r} {reason}; give a folder of images or a zip archive of one"
        ) from error


def check_data(config: DataConfig) -> None:
    """Refuse a data path at which there is nothing.

    Raises:
        ValueError: that names it.
    """
    if config.source == "folder":
        status_of(str(config.path or ""))
    for _, part in config.parts.values() if config.is_stream else ():
        for url in (part.path, part.validation_path, *texts_in(part.data_files)):
            if isinstance(url, str):
                check_url(url)
    if config.source == "latents":
        for path in paths_of(config):
            check_cache(path)


def texts_in(value: Any) -> list[str]:
    """The texts of a value as YAML has it, however deep they lie: files may be named one by one, and by split."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in texts_in(one)]
    return [value] if isinstance(value, str) else []


def paths_of(config: DataConfig) -> list[str]:
    """The places that a data path names, one or several."""
    return list(config.path) if isinstance(config.path, list) else [config.path or ""]


def check_cache(path: str | Path) -> None:
    """Refuse a folder without a cache of latents; of a URL the scheme, as its place is asked when it is opened."""
    local = local_path(path)
    if local is None:
        check_url(str(path))
    elif not (local / MANIFEST).is_file():
        raise no_cache(path)


def no_cache(path: str | Path) -> ValueError:
    return ValueError(f"there is no latent cache in {str(path)!r}: make one with tarflow cache-latents")
