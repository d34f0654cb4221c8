"""Small data for comparing flows: points of the plane, 8 × 8 digits, latents of the project's drawings.

Shapes: N samples; points are images of one channel and 1 × 2 numbers, so that a point is two tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.data.drawings import Drawings
from tarflow.data.images import to_model
from tarflow.vae.codec import LatentCodec, load_autoencoder, measure_latents

PLANES = ("spirals", "checkerboard")
#: Values of a digit's pixel, and how many digits are kept from training.
LEVELS, HELD_OUT_DIGITS = 17, 360


@dataclass(frozen=True)
class Samples:
    """Training and held-out data.

    Attributes:
        train, held_out: (N, C, H, W), without noise.
        train_labels, held_out_labels: (N,) int64, or None.
        codec: decodes latents; None where there is nothing to decode.
    """

    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    codec: Any = None

    def labels(self) -> tuple[Tensor, Tensor]:
        """Those of training and of held-out data.

        Raises:
            ValueError: if there are none.
        """
        if self.train_labels is None or self.held_out_labels is None:
            raise ValueError("these data have no labels")
        return self.train_labels, self.held_out_labels


def points(name: str, count: int, seed: int) -> Tensor:
    """Draws from a density of `PLANES`, (count, 1, 1, 2): two noisy spiral arms, or the dark squares of a board of 4 × 4
    unit squares, whose entropy is log 8 nats.

    Raises:
        ValueError: for another name.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if name == "spirals":
        turn = 3 * math.pi * uniform(count).sqrt()
        arm = torch.where(uniform(count) < 0.5, 1.0, -1.0)
        places = arm[:, None] * torch.stack([-turn.cos(), turn.sin()], 1) * turn[:, None] / 4.5
        places = places + 0.08 * torch.randn(count, 2, generator=generator)
    elif name == "checkerboard":
        column, half = (4 * uniform(count)).floor(), (2 * uniform(count)).floor()
        corner = torch.stack([column - 2, 2 * half + column % 2 - 2], 1)
        places = corner + uniform(count, 2)
    else:
        raise ValueError(f"the density must be one of {', '.join(PLANES)}, got {name!r}")
    return places.view(count, 1, 1, 2)


def plane_samples(name: str, count: int = 20000) -> Samples:
    """Points for training, and 5,000 held out."""
    return Samples(points(name, count, 0), points(name, 5000, 1))


def digit_samples() -> Samples:
    """Scikit-learn's 1,797 digits, (N, 1, 8, 8) with values 0 … 16, the last 360 of a fixed order held out.

    Raises:
        ModuleNotFoundError: without scikit-learn.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None]
    labels = torch.from_numpy(data.target).long()[order]
    train = slice(0, len(images) - HELD_OUT_DIGITS)
    rest = slice(len(images) - HELD_OUT_DIGITS, None)
    return Samples(images[train], images[rest], labels[train], labels[rest])


def drawing_samples(count: int, held_out: int = 256, batch_size: int = 64) -> Samples:
    """Normalised latents (N, 8, 8, 8) of drawings of 64 pixels by the shipped autoencoder, labels, and the codec.

    Held out are other drawings of the same combinations, so that all classes are known.
    """
    drawings = Drawings("train", 64, length=count + held_out)
    vae = load_autoencoder("drawings_emoji_f8c8")
    items = [drawings[index] for index in range(len(drawings))]
    pixels = torch.stack([as_tensor(item["image"]) for item in items])
    parts = pixels.split(batch_size)
    codec = LatentCodec(vae, *measure_latents(vae, parts[:8], to_model))
    with torch.no_grad():
        latents = torch.cat([codec.encode(to_model(part)).float() for part in parts])
    labels = torch.tensor([item["label"] for item in items])
    return Samples(latents[:count], latents[count:], labels[:count], labels[count:], codec)


def as_tensor(image: Any) -> Tensor:
    """A PIL picture as uint8 (3, H, W)."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
