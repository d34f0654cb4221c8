"""Which files are pictures, and which of them Pillow can read here."""

from __future__ import annotations

import posixpath
from contextlib import suppress
from functools import cache
from importlib import import_module

from PIL import Image

#: Formats that data sets are made of. Some need a plug-in, or a Pillow that was built with their library.
PICTURE_SUFFIXES = frozenset(
    [
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jfi",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".avifs",
        ".heic",
        ".heif",
        ".hif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpc",
        ".jpf",
        ".jpx",
        ".qoi",
        ".tga",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".mpo",
    ]
)
#: Drawings, raw camera files and the like, which have to be converted first.
OTHER_SUFFIXES = frozenset(
    [
        ".svg",
        ".svgz",
        ".eps",
        ".ai",
        ".psd",
        ".psb",
        ".xcf",
        ".kra",
        ".ico",
        ".icns",
        ".cur",
        ".exr",
        ".hdr",
        ".dds",
        ".pcx",
        ".sgi",
        ".pfm",
        ".fits",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".raf",
        ".rw2",
        ".pef",
        ".srw",
        ".raw",
    ]
)
#: Names that Pillow does not list for formats that it reads.
ALIASES = {".jfi": ".jfif", ".hif": ".heif"}
PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")

#: Folders and files that systems and programs leave beside pictures, besides all whose names begin with a dot.
SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "network trash folder",
        "temporary items",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)


def is_of_system(name: str) -> bool:
    """Whether a file's or folder's own name is one that operating systems, servers or notebooks give."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def suffix(name: str) -> str:
    """The end of a file's name, ".jpg", in small letters; "" if it has none."""
    place = name.rfind(".")
    if place < 1 or "/" in name[place:] or name[place - 1] in "./":  # few: dots elsewhere, or at the beginning
        return posixpath.splitext(name)[1].lower()
    return name[place:].lower()


@cache
def readable_suffixes() -> frozenset[str]:
    """Those of `PICTURE_SUFFIXES` that Pillow can read, with the plug-ins that are installed."""
    for name in PLUGINS:
        with suppress(ImportError):
            plugin = import_module(name)
            if hasattr(plugin, "register_heif_opener"):
                plugin.register_heif_opener()
    known = Image.registered_extensions()
    return frozenset(end for end in PICTURE_SUFFIXES if known.get(ALIASES.get(end, end)) in Image.OPEN)


def count_suffixes(names: list[str]) -> str:
    """How many files end how: "3 .heic, 1 .jxl"."""
    ends = [suffix(name) for name in names]
    return ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))
