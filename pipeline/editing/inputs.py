"""Pictures, masks and conditions that a caller gives to the exact-flow tools, as tensors; one sentence for each that
does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tarflow.common.modes import flatten

Pictures = Image.Image | list[Image.Image] | Tensor
Mask = Image.Image | Tensor | np.ndarray


def read_images(image: Pictures, size: tuple[int, int], fit: bool = False) -> Tensor:
    """Pictures as floats (B, 3, H, W) in [−1, 1].

    Args:
        image: a PIL picture or a list of them; or a tensor (3, H, W) or (B, 3, H, W), of 8 bits or in [0, 1].
        size: height and width that they must have.
        fit: resize PIL pictures so that they just cover that, and crop them around the centre.

    Raises:
        ValueError: for another size or type, numbers outside [0, 1], or transparency.
    """
    if isinstance(image, Tensor):
        images = image[None] if image.ndim == 3 else image
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"a tensor of images must have the shape (B, 3, H, W), got {tuple(image.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if not (images.is_floating_point() and float(images.min()) >= 0 and float(images.max()) <= 1):
            raise ValueError("a tensor of images must have 8-bit numbers, or real ones from 0 to 1")
        check_size(images, size)
    else:
        pictures = [read_picture(one, size, fit) for one in (image if isinstance(image, list) else [image])]
        if not pictures:
            raise ValueError("there is no image in the list: give one")
        images = torch.stack(pictures)
    return images * 2 - 1


def check_size(image: Tensor, size: tuple[int, int]) -> None:
    """Whether a picture (…, H, W) has the height and width that it must have."""
    height, width = image.shape[-2:]
    if (height, width) != size:
        raise ValueError(
            f"the image has {height} × {width} pixels, the model takes {size[0]} × {size[1]}: "
            "resize it, or give a PIL picture with fit=True; pictures of data have data.image_size"
        )


def read_picture(image: Image.Image, size: tuple[int, int], fit: bool) -> Tensor:
    """One PIL picture as floats (3, H, W) in [0, 1]."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image must be a PIL picture, a list of them, or a tensor, got {type(image).__name__}")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        raise ValueError("the image is transparent: put it on a background first")
    image = upright(image, "image")
    if fit:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    check_size(picture, size)
    return picture


def upright(image: Image.Image, name: str) -> Image.Image:
    """A picture of any mode as an RGB one of 8 bits, turned as a camera says.

    Raises:
        ValueError: if it is not known which of its numbers are black and white.
    """
    try:
        return flatten(image, (255, 255, 255))
    except ValueError as error:
        raise ValueError(f"the {name} cannot be read: {error}") from error


def read_mask(mask: Mask, batch: int, size: tuple[int, int]) -> Tensor:
    """A mask of pixels to make, as booleans (B, H, W).

    Args:
        mask: a PIL picture, white where to make; or a tensor or array (H, W), (B, H, W) or (B, 1, H, W) of booleans or
            numbers, True or above one half where to make.
        batch: how many pictures it is for.
        size: their height and width.

    Raises:
        ValueError: for another size, or if it selects nothing or everything.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(upright(mask, "mask").convert("L"), dtype=np.float32) / 255
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the mask must be a PIL picture, a tensor or an array, got {mask!r}") from error
    mask = mask if mask.dtype == torch.bool else mask > 0.5
    shape = tuple(mask.shape)
    mask = mask[:, 0] if mask.ndim == 4 and shape[1] == 1 else mask
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or tuple(mask.shape[1:]) != size or mask.shape[0] not in (1, batch):
        raise ValueError(f"the mask must have the image's {size[0]} × {size[1]} pixels, got the shape {shape}")
    if not mask.flatten(1).any(1).all():
        raise ValueError("the mask selects no pixel: there is nothing to make")
    if mask.flatten(1).all(1).any():
        raise ValueError("the mask selects all pixels: nothing is known; draw a picture instead")
    return mask.expand(batch, -1, -1)


def tokens_of_mask(mask: Tensor, unit: int) -> Tensor:
    """The tokens (B, h, w) that a mask (B, H, W) touches, each of ``unit`` × ``unit`` pixels.

    Raises:
        ValueError: if it touches all of them.
    """
    touched = mask.unflatten(2, (-1, unit)).unflatten(1, (-1, unit)).any(4).any(2)
    if touched.flatten(1).all(1).any():
        raise ValueError(
            f"the mask touches each of the model's tokens, squares of {unit} × {unit} pixels: leave one whole"
        )
    return touched


def as_many(values: Any, batch: int, name: str) -> list[Any]:
    """One value for each of ``batch`` pictures, from one or as many."""
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(values) not in (1, batch):
        raise ValueError(f"{name} has {len(values)} entries for {batch} images; give one, or one for each image")
    return values * (batch // len(values))
