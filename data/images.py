"""Any source of pictures as a torch data set of square RGB tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from tarflow.data.config import DataConfig
from tarflow.data.drawings import Drawings

#: How many unreadable pictures in a row are skipped before giving up.
MAX_SKIPS = 100


class Images(Dataset):
    """Items ``{"image": uint8 (3, S, S), "caption": str, "label": int, "skipped": [messages]}`` of one split.

    Args:
        config: the data section of a configuration.
        split: "train" or "validation".

    Raises:
        ValueError: what the source raises; with ``on_error: skip`` unreadable pictures are replaced by the next
            readable one and named in ``skipped``.
    """

    def __init__(self, config: DataConfig, split: str = "train"):
        self.config, self.split = config, split
        self.source = open_source(config, split)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[str] = []
        while True:
            try:
                item = dict(self.source[index])
                break
            except ValueError as error:
                skipped.append(str(error))
                if self.config.on_error == "raise" or len(skipped) >= min(MAX_SKIPS, len(self)):
                    raise
                index = (index + 1) % len(self)
        background = background_colour(self.config.background, self.config.seed, index)
        image = square(flatten(item.pop("image"), background), self.config.image_size)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, S, S)
        return {"image": tensor, **item, "skipped": skipped}


def open_source(config: DataConfig, split: str) -> Any:
    """The map-style data set that a configuration names."""
    if split not in ("train", "validation"):
        raise ValueError(f"the split must be 'train' or 'validation', got {split!r}")
    if config.source == "drawings":
        return Drawings(split, config.image_size, config.seed)
    if config.source == "folder":
        from tarflow.data.folder import ImageFolder

        return ImageFolder(config, split)
    from tarflow.data.named import NamedDataset  # imported here because Datasets takes seconds to import

    return NamedDataset(config, split)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: images (B, 3, S, S) uint8, captions and skipped as lists, labels (B,) int64."""
    batch: dict[str, Any] = {"image": torch.stack([item["image"] for item in items])}
    if "caption" in items[0]:
        batch["caption"] = [item["caption"] for item in items]
    if "label" in items[0]:
        batch["label"] = torch.tensor([item["label"] for item in items])
    batch["skipped"] = [message for item in items for message in item["skipped"]]
    return batch


def to_model(images: Tensor) -> Tensor:
    """uint8 pictures (B, 3, S, S) as floats in [−1, 1]."""
    return images.float() / 127.5 - 1


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


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An upright RGB picture of 8 bits; transparency is put on the background colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits in all picture formats; converting would cut off, not scale
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Resized so that the shorter side is ``size``, then centre-cropped to ``size`` × ``size``."""
    if image.size != (size, size):
        width, height = image.size
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return image
