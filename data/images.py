"""Any source of pictures as a torch data set of RGB tensors of a wanted size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tarflow.data.config import DataConfig
from tarflow.data.drawings import Drawings
from tarflow.data.files import hash_of
from tarflow.data.folder import ImageFolder, flattened

#: How many unreadable pictures in a row are skipped before giving up.
MAX_SKIPS = 100


class PictureSource(Protocol):
    """A map-style data set of pictures, as `open_source` gives it."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Readable names of the classes; None without classes."""

    @property
    def has_captions(self) -> bool:
        """Whether its items have captions."""

    def caption(self, index: int) -> str | None:
        """The caption alone, without decoding the picture."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the upright picture, without decoding it."""

    def facts(self, count: int) -> dict[str, str]:
        """Hashes that tell whether the first ``count`` items are those of another time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An item with a PIL ``image``, and a ``caption`` and a ``label`` where there are such."""


class Pictures(Protocol):
    """Pictures of one size: `Images`, or what has as much of it."""

    split: str
    config: DataConfig

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Images(Dataset[dict[str, Any]]):
    """Items ``{"image": uint8 (3, S, S), "caption": str, "label": int, "skipped": [messages]}`` of one split.

    Args:
        config: the data section of a configuration.
        split: "train" or "validation".
        beside: the other split, if it is open, whose listing is used again.

    Raises:
        ValueError: what the source raises; with ``on_error: skip`` unreadable pictures are replaced by the next
            readable one and named in ``skipped``.
    """

    def __init__(self, config: DataConfig, split: str = "train", beside: Images | None = None):
        self.config, self.split = config, split
        self.source: PictureSource
        if beside is not None and isinstance(beside.source, ImageFolder) and beside.config == config:
            self.source = beside.source.of_split(split)
        else:
            self.source = open_source(config, split)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    @property
    def has_captions(self) -> bool:
        return self.source.has_captions

    def caption(self, index: int) -> str | None:
        """The caption alone, without reading the picture."""
        return self.source.caption(index)

    def facts(self, count: int) -> dict[str, str]:
        """Hashes that tell whether the first ``count`` items, and the classes, are those of another time."""
        return {**self.source.facts(count), "classes": hash_of(self.class_names or ())}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.fitted(index, self.config.image_size, self.config.image_size)

    def fitted(self, index: int, height: int, width: int) -> dict[str, Any]:
        """Item ``index`` with a picture (3, height, width)."""
        skipped: list[str] = []
        while True:
            try:
                item = dict(self.source[index])
                background = background_colour(self.config.background, self.config.seed, index)
                image = fit(flattened(item.pop("image"), background), height, width)
                break
            except ValueError as error:
                skipped.append(str(error))
                if self.config.on_error == "raise" or len(skipped) >= min(MAX_SKIPS, len(self)):
                    raise
                index = (index + 1) % len(self)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)
        return {"image": tensor, **item, "skipped": skipped}


def open_source(config: DataConfig, split: str) -> PictureSource:
    """The pictures that a configuration names."""
    if config.source == "latents":
        raise ValueError("data.source is 'latents', but pictures are needed here: name what the cache was made of")
    if config.is_stream:
        raise ValueError(
            "the data is a stream, of which only the next pictures are known, but pictures by number are needed here: name a "
            "folder, an archive, a data set without data.streaming, or a cache"
        )
    if split not in ("train", "validation"):
        raise ValueError(f"the split must be 'train' or 'validation', got {split!r}")
    if config.source == "drawings":
        return Drawings(split, config.image_size, config.seed)
    if config.source == "folder":
        return ImageFolder(config, split)
    from tarflow.data.named import NamedDataset  # imported here because Datasets takes seconds to import

    return NamedDataset(config, split)


def collate(items: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """A batch of `Images` or `CachedLatents`: tensors stacked, captions and skipped as lists, labels (B,) int64. What is a
    batch already stays as it is."""
    if isinstance(items, dict):
        return items
    batch: dict[str, Any] = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if key == "skipped":
            batch[key] = [message for messages in values for message in messages]
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "label" else values
    return batch


def to_model(images: Tensor) -> Tensor:
    """uint8 pictures (B, 3, S, S) as floats in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [−1, 1] as 8-bit numbers, the nearest ones; what lies outside is cut off. The inverse of `to_model`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def bytes_of(images: Tensor) -> Tensor:
    """Pictures in [0, 1], of whatever device, as 8-bit numbers on the CPU."""
    return to_uint8(images.cpu() * 2 - 1)


def nearest_size(sizes: Sequence[tuple[int, int]], height: int, width: int) -> tuple[int, int]:
    """The height and width of ``sizes`` whose ratio is nearest to a picture's, on a logarithmic scale."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def background_colour(background: str, seed: int, index: int) -> tuple[int, int, int]:
    """White, black, or (for "random") white for half of the pictures and any colour for the others."""
    if background == "black":
        return (0, 0, 0)
    if background == "white":
        return (255, 255, 255)
    rng = np.random.default_rng((seed, index))
    if rng.random() < 0.5:
        return (255, 255, 255)
    r, g, b = (int(v) for v in rng.integers(0, 256, 3))
    return r, g, b


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resized so that it just covers ``height`` × ``width``, then centre-cropped to that."""
    if image.size != (width, height):
        scale = max(height / image.height, width / image.width)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(covering, Image.Resampling.LANCZOS)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image
