"""Pictures of every mode that Pillow has, as 8-bit ones of red, green and blue.

Numbers of more than 8 bits need to know which of them is white. 16 bits have all of their range, 12-bit TIFFs theirs,
and floats reach from 0 to 1. Other floats and integers of 32 bits do not say it, and are refused rather than guessed.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
#: Formats whose integers Pillow holds in 32 bits, but that have 16.
OF_16_BITS = ("PNG", "PPM", "JPEG2000")


def check_mode(image: Image.Image) -> None:
    """Whether it is known which numbers of a picture are black and white.

    Raises:
        ValueError: if it is not.
    """
    if image.mode == "I" and image.format not in OF_16_BITS:
        low, high = image.getextrema()
        raise ValueError(
            f"its integers of 32 bits, or with a sign, reach from {low} to {high}, and it is not known which is white: "
            "save it with 8 or 16 bits"
        )
    if image.mode == "F":
        numbers = np.asarray(image)
        if not ((numbers >= 0) & (numbers <= 1)).all():  # no number at all (NaN) is outside too
            raise ValueError(
                f"its floats reach from {numbers.min():g} to {numbers.max():g}, expected 0 to 1: divide them, or save it "
                "with 8 or 16 bits"
            )


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An upright RGB picture of 8 bits; transparency is put on the background colour.

    Raises:
        ValueError: if it is not known which numbers are black and white.
    """
    check_mode(image)
    levels = levels_of(image)  # of the file's tags, which the upright picture lacks
    image = to_8_bits(ImageOps.exif_transpose(image), *levels)
    if image.mode == "LAB":
        image = lab_to_rgb(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def levels_of(image: Image.Image) -> tuple[int, bool]:
    """The largest integer of a picture of more than 8 bits, and whether that is black, which Pillow leaves as it is."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE)
    return (2**12 if bits in (12, (12,)) else 2**16) - 1, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def to_8_bits(image: Image.Image, largest: int, inverted: bool) -> Image.Image:
    """A picture of one channel of integers up to ``largest``, or of floats, with 8 bits; others as they are."""
    if image.mode == "F":
        numbers = (np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8)
    elif image.mode.startswith("I"):
        numbers = (np.asarray(image).clip(0, largest) // ((largest + 1) // 256)).astype(np.uint8)
    else:
        return image
    found = Image.fromarray(255 - numbers if inverted else numbers)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the number that is transparent
        found.putalpha(Image.fromarray((np.asarray(image) != clear).astype(np.uint8) * 255))
    return found


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """A picture of CIELAB, which Pillow converts by colour management alone."""
    from PIL import ImageCms  # imported here, as few pictures need it

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    assert converted is not None  # it is one only where the picture itself is changed
    return converted
