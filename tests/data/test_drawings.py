"""The project's drawings, the checker that reads them, and the shipped autoencoder on them."""

from __future__ import annotations

import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.data.drawing_checker import caption_attributes, match_shares, read_drawing
from tarflow.data.drawings import (
    BACKGROUNDS,
    CLASS_NAMES,
    COLOURS,
    SHAPES,
    SIZES,
    Drawings,
    is_held_out,
    outline,
    random_drawing,
    render,
)
from tarflow.vae.codec import LatentCodec, load_autoencoder

FRESH = 7  # a seed that nothing was trained with
COUNT = 200


@pytest.fixture(scope="module")
def fresh() -> tuple[list[Image.Image], list[str]]:
    """Half of the drawings from each split."""
    drawings = [random_drawing(FRESH, i, split) for split in ("train", "validation") for i in range(COUNT // 2)]
    return [render(drawing) for drawing in drawings], [drawing.caption for drawing in drawings]


def test_the_same_index_is_the_same_picture() -> None:
    first, second = Drawings(seed=3), pickle.loads(pickle.dumps(Drawings(seed=3)))
    for index in (0, 1, 12345):
        a, b = first[index], second[index]
        assert np.array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
        assert (a["caption"], a["label"]) == (b["caption"], b["label"])
        assert first.caption(index) == a["caption"]


def test_other_indices_seeds_and_splits_are_other_pictures() -> None:
    pictures = [
        np.asarray(Drawings(split, seed=seed)[index]["image"]).tobytes()
        for split, seed, index in product(("train", "validation"), (0, 1), (0, 1))
    ]
    assert len(set(pictures)) == len(pictures)


def test_known_captions_stay_as_they_are() -> None:
    """On every machine, whatever the versions of the libraries; sizes and places are tuned more freely."""
    assert random_drawing(0, 0).caption == "a small yellow cross on a dark background"
    assert random_drawing(0, 1).caption == "a large orange star on a grey background"


def test_held_out_combinations_are_never_trained_on() -> None:
    combinations = list(product(SHAPES, COLOURS, BACKGROUNDS))
    held_out = {combination for combination in combinations if is_held_out(*combination)}
    assert (len(combinations), len(held_out)) == (108, 12)
    for split in ("train", "validation"):
        for index in range(1500):
            drawing = random_drawing(0, index, split)
            combination = (drawing.shape, drawing.colour, drawing.background)
            assert (combination in held_out) == (split == "validation")


def test_every_word_is_seen_in_training() -> None:
    seen = {word for index in range(600) for word in random_drawing(0, index).caption.split()}
    assert {*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES} <= seen


def test_drawings_stay_inside_the_picture() -> None:
    for index in range(300):
        drawing = random_drawing(0, index)
        assert all(drawing.radius < place < 1 - drawing.radius for place in drawing.centre)


def test_captions_parse() -> None:
    for index in range(100):
        drawing = random_drawing(FRESH, index)
        words = {"shape": drawing.shape, "colour": drawing.colour, "background": drawing.background}
        assert caption_attributes(drawing.caption) == words
        assert CLASS_NAMES[drawing.label] == f"{drawing.colour} {drawing.shape}"
    assert caption_attributes("A Small RED circle on a dark background")["colour"] == "red"


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red circle", "names 0 backgrounds"),
        ("a red blue circle on a dark background", "names 2 colours"),
        ("", "names 0 shapes"),
    ],
)
def test_captions_that_do_not_parse_are_errors(caption: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_attributes(caption)


def test_class_names_are_all_combinations() -> None:
    assert CLASS_NAMES[0] == "red circle"
    assert len(set(CLASS_NAMES)) == len(SHAPES) * len(COLOURS) == len(CLASS_NAMES)


def test_the_data_set_has_a_length() -> None:
    drawings = Drawings(length=3, image_size=32)
    assert len(drawings) == 3
    assert drawings[2]["image"].size == (32, 32)
    for index in (3, -1):
        with pytest.raises(IndexError):
            drawings[index]
    assert len(Drawings()) > 10**9
    with pytest.raises(ValueError, match="'train' and 'validation', not 'test'"):
        Drawings("test")
    with pytest.raises(ValueError, match="unknown shape 'heart'"):
        outline("heart", 0.0)


def test_the_checker_reads_fresh_drawings(fresh: tuple[list[Image.Image], list[str]]) -> None:
    shares = match_shares(*fresh)
    assert shares == {"shape": 1.0, "colour": 1.0, "background": 1.0, "all": 1.0}


@pytest.mark.parametrize("image_size", [32, 128])
def test_the_checker_reads_other_sizes(image_size: int) -> None:
    drawings = [random_drawing(FRESH, index) for index in range(60)]
    shares = match_shares([render(drawing, image_size) for drawing in drawings], [d.caption for d in drawings])
    assert shares["all"] >= 0.98


def test_the_checker_knows_what_is_no_drawing() -> None:
    grey = Image.new("RGB", (64, 64), BACKGROUNDS["grey"])
    reading = read_drawing(grey)
    assert (reading.shape, reading.colour, reading.background) == ("none", "none", "grey")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert read_drawing(noise).shape == "none"
    pink = Image.new("RGB", (64, 64), (255, 0, 255))
    assert read_drawing(pink).background == "none"


def test_the_checker_says_what_is_wrong(fresh: tuple[list[Image.Image], list[str]]) -> None:
    images, captions = fresh
    shares = match_shares(images[:100], captions[1:101])
    assert shares["all"] < 0.2
    assert all(shares["all"] <= shares[name] < 0.8 for name in ("shape", "colour", "background"))
    with pytest.raises(ValueError, match="as many captions as images"):
        match_shares(images, captions[:-1])
    with pytest.raises(ValueError, match="at least one"):
        match_shares([], [])
    with pytest.raises(ValueError, match="expected an RGB picture"):
        read_drawing(np.zeros((64, 64), dtype=np.uint8))


def test_the_shipped_autoencoder_keeps_drawings(fresh: tuple[list[Image.Image], list[str]]) -> None:
    images, captions = fresh
    codec = LatentCodec(load_autoencoder("drawings_emoji_f8c8"))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    with torch.no_grad():
        parts = [codec.decode(codec.encode(part / 127.5 - 1)) for part in pixels.float().split(20)]
    decoded = ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round()
    error = (decoded - pixels).pow(2).mean((1, 2, 3))
    psnr = (20 * math.log10(255) - 10 * error.log10()).mean()
    assert psnr >= 27
    arrays = decoded.permute(0, 2, 3, 1).byte().numpy()
    assert match_shares([Image.fromarray(array) for array in arrays], captions)["all"] >= 0.99
