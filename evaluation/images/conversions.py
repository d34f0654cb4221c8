"""What has to be done to pictures before they can be compared, in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from PIL import Image

from tarflow.data.images import PictureSource


def conversions_of(image: Image.Image, content: bytes = b"") -> list[str]:
    """What `flatten` changes about a picture, from its mode and its file's first bytes."""
    found = []
    deep_png = content[:8] == b"\x89PNG\r\n\x1a\n" and content[24:25] == b"\x10"  # PIL opens RGB of 16 bits as 8
    if image.mode.startswith("I") or deep_png:
        found.append("16-bit, reduced to 8 bits")
    if image.mode[0] in "1LI" and image.mode != "LAB":
        found.append("greyscale, converted to RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        found.append("transparent, put on the background colour")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F"):
        found.append(f"of mode {image.mode}, converted to RGB")
    return found


def notes_of(conversions: Counter[str]) -> list[str]:
    """One sentence for each conversion."""
    return [f"{number} of the pictures: {what}" for what, number in sorted(conversions.items())]


class Watched:
    """A source of pictures that writes down what will be done to those it gives."""

    def __init__(self, source: PictureSource):
        self.source = source
        self.conversions: dict[int, list[str]] = {}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    @property
    def has_captions(self) -> bool:
        return self.source.has_captions

    def caption(self, index: int) -> str | None:
        return self.source.caption(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(index)

    def facts(self, count: int) -> dict[str, str]:
        return self.source.facts(count)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[index]
        self.conversions[index] = conversions_of(item["image"])
        return item
