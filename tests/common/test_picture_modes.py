"""Pictures of every mode and depth: the right greys, or one sentence."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow.common.modes import flatten
from tarflow.data.config import DataConfig
from tarflow.data.images import Images
from tarflow.evaluation.images.sets import open_images

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def read(path: Path, **options: Any) -> np.ndarray:
    """The one picture of a folder, (H, W, 3)."""
    data = DataConfig(source="folder", path=str(path), image_size=16, validation_fraction=0.0, **options)
    return Images(data)[0]["image"].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["tif", "png", "pgm", "jp2"])
def test_16_bits(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    try:
        image.save(tmp_path / f"x.{kind}", **({"irreversible": False} if kind == "jp2" else {}))
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    assert np.abs(read(tmp_path)[:, :, 0] - RAMP * 255).max() <= 1


def test_floats_from_0_to_1(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "x.tif")
    assert np.abs(read(tmp_path) - (RAMP * 255)[:, :, None]).max() <= 0.51


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((RAMP * 65535).astype(np.float32), "its floats reach from 0 to 65535, expected 0 to 1"),
        ((RAMP * 255).astype(np.float32), "its floats reach from 0 to 255, expected 0 to 1"),
        ((RAMP - 0.5).astype(np.float32), "its floats reach from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "its floats reach from nan to nan"),
        ((RAMP * 255).astype(np.int32), "its integers of 32 bits, or with a sign, reach from 0 to 255"),
        ((RAMP * 2**31 * 0.9).astype(np.int32), ".* it is not known which is white: save it with 8 or 16 bits"),
    ],
)
def test_numbers_whose_white_is_not_known(tmp_path: Path, numbers: np.ndarray, message: str) -> None:
    Image.fromarray(numbers).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"cannot read the image .*x\.tif: {message}"):
        read(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot read the image .*x\.tif: {message}"):
        list(open_images(tmp_path).batches(1))
    with pytest.raises(ValueError, match=message):
        flatten(Image.fromarray(numbers), (0, 0, 0))
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "y.png")
    data = DataConfig(source="folder", path=str(tmp_path), image_size=16, validation_fraction=0.0, on_error="skip")
    item = Images(data)[0]
    assert int(item["image"].max()) == 9
    assert "x.tif" in item["skipped"][0]


def tiff(bits: int, photometric: int, strip: bytes, width: int = 2) -> bytes:
    """A little-endian TIFF of one row of grey."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 1)]
    tags += [(279, len(strip))]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + strip


def test_12_bits_and_white_as_zero(tmp_path: Path) -> None:
    """Two pixels, of which the first is dark: 0x010 and 0xFFF of 12 bits, 0x0100 and 0xFFFF of 16."""
    deep, wide = b"\x01\x0f\xff", struct.pack("<HH", 0x0100, 0xFFFF)
    for name, content, expected in (
        ("twelve", tiff(12, 1, deep), [1, 255]),
        ("sixteen", tiff(16, 1, wide), [1, 255]),
        ("negative", tiff(16, 0, wide), [254, 0]),
    ):
        image = Image.open(io.BytesIO(content))
        image.load()
        assert image.mode == "I;16", name
        assert np.asarray(flatten(image, (0, 0, 0)))[0, :, 0].tolist() == expected, name


def test_palettes_and_alpha(tmp_path: Path) -> None:
    """The left half clear, the right one opaque: the background shows on the left alone."""
    whole = Image.new("RGBA", (16, 16), (200, 40, 90, 0))
    whole.paste((200, 40, 90, 255), (8, 0, 16, 16))
    grey = whole.convert("LA")
    palette = whole.quantize(4)
    for name, image in (("rgba", whole), ("la", grey), ("p", palette), ("pa", whole.convert("PA"))):
        folder = tmp_path / name
        folder.mkdir()
        image.save(folder / ("x.tif" if name == "pa" else "x.png"))
        pixels = read(folder, background="white")
        assert (pixels[:, :8] == 255).all(), name
        assert np.abs(pixels[:, 8:] - np.asarray(image.convert("RGB"))[:, 8:].astype(int)).max() <= 1, name
        assert flatten(image, (0, 0, 0)).getpixel((0, 0)) == (0, 0, 0), name


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_one_grey_as_transparency(tmp_path: Path, kind: type) -> None:
    numbers = np.full((16, 16), 7, dtype=kind)
    numbers[:, 8:] = np.iinfo(kind).max // 2 + 1
    Image.fromarray(numbers).save(tmp_path / "x.png", transparency=7)
    pixels = read(tmp_path, background="white")
    assert (pixels[:, :8] == 255).all()
    assert np.abs(pixels[:, 8:].astype(int) - 128).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La", "PA", "I;16"])
def test_every_mode_has_the_same_grey(mode: str) -> None:
    """A grey that the mode has, within what converting rounds."""
    if mode == "LAB":
        image, value = Image.new("LAB", (4, 4), (137, 128, 128)), 128  # lightness 53.7 of 100
    elif mode == "I;16":
        image, value = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)), 128
    else:
        value = {"1": 255, "P": 153, "PA": 153}.get(mode, 128)  # the palette has 153
        image = Image.new("RGB", (4, 4), (value,) * 3)
        image = image.convert("RGBA" if mode == "RGBa" else "LA" if mode == "La" else "RGB").convert(mode)
    assert image.mode == mode
    pixels = np.asarray(flatten(image, (0, 0, 0))).astype(int)
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels - value).max() <= 2


def test_rotated_pictures_of_16_bits() -> None:
    picture = Image.fromarray((RAMP[:2, :3] * 65535).round().astype(np.uint16))
    exif = picture.getexif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        picture.save(file, kind, exif=exif)
        image = Image.open(io.BytesIO(file.getvalue()))
        image.load()
        turned = np.asarray(flatten(image, (0, 0, 0)))[:, :, 0]
        assert turned.shape == (3, 2), kind
        assert np.abs(turned - np.rot90(RAMP[:2, :3] * 255, -1)).max() <= 1, kind
