"""Pieces of the page: pictures inside the text itself, so that no file is written for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tarflow.demo.drawing import Progress, Result, Stage

#: Longer sides of the pictures of a strip are made smaller than this before they are sent.
STRIP_SIDE = 192


def png(image: Image.Image, told: str = "") -> bytes:
    """A picture as a file that says what it shows, so that it still does once it is saved."""
    file, notes = io.BytesIO(), PngInfo()
    if told:
        notes.add_itxt("Description", told)
    image.save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def data_uri(image: Image.Image, told: str = "") -> str:
    """A picture as the address of an <img>."""
    return "data:image/png;base64," + base64.b64encode(png(image, told)).decode("ascii")


def img(image: Image.Image, text: str, crisp: bool = False) -> str:
    """An <img>; ``text`` for those who do not see it, ``crisp`` for numbers rather than a picture."""
    kind = ' class="crisp"' if crisp else ""
    return f'<img src="{data_uri(image, text)}" alt="{escape(text)}"{kind}>'


def figure(image: Image.Image, caption: str, crisp: bool = False) -> str:
    return f"<figure>{img(image, caption, crisp)}<figcaption>{escape(caption)}</figcaption></figure>"


def sentence(text: str, kind: str = "error") -> str:
    """What went wrong, or (of another kind) what there is to say."""
    return f'<p class="sentence {kind}" role="alert">{escape(text)}</p>'


def progress(state: Progress) -> str:
    """A bar, what is computed, and since when; a bar that moves without end where nobody knows how long it takes."""
    value = ' class="busy"' if state.fraction is None else f' value="{state.fraction:.3f}"'
    return (
        f'<div class="progress"><progress max="1"{value}></progress>'
        f"<span>{escape(state.message)}</span><span>{state.seconds:.1f} s</span></div>"
    )


def named(condition: str, seed: int, number: int) -> str:
    """What a drawing shows, and what to type to have it again."""
    return f"{condition}{', ' if condition else ''}seed {seed}, image {number}"


def pictures(images: Sequence[Image.Image], condition: str, seed: int, guidance_scale: float | None = None) -> str:
    """Drawings, as large as there is room, with what was asked for.

    Args:
        images: one after the other, of one seed.
        condition: a caption or the name of a class; "" is none.
        seed: of all.
        guidance_scale: None for models without conditions.
    """
    size = {1: "one", 2: "two"}.get(len(images), "many")
    cells = "".join(
        f"<figure>{img(image, named(condition, seed, number))}<figcaption>seed {seed}, image {number}</figcaption></figure>"
        for number, image in enumerate(images, start=1)
    )
    guidance = "" if guidance_scale is None else f", guidance scale {guidance_scale:g}"
    told = f'<p class="told">{escape(condition)}<span>{guidance}</span></p>' if condition else ""
    return f'{told}<div class="pictures {size}">{cells}</div>'


def strip(stages: Iterable[Stage]) -> str:
    """The first image at each stage."""
    figures = []
    for stage in stages:
        image = stage.images[0].copy()
        image.thumbnail((STRIP_SIDE, STRIP_SIDE))
        figures.append(figure(image, stage.name))
    return f'<div class="strip">{"".join(figures)}</div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are."""
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<dl class="facts">{cells}</dl>'


def result_facts(result: Result) -> str:
    """How exact a run was, how long it took, and how its blocks were inverted."""
    largest = max(result.residual_max)
    mean = sum(result.residual_mean) / len(result.residual_mean)
    count = len(result.images)
    each = "" if count == 1 else f", {result.seconds / count:.2f} s for each of {count} images"
    if len(set(result.decodings)) == 1:
        decodings = f"{result.decodings[0]} in every block"
    else:
        decodings = " · ".join(f"block {i}: {name}" for i, name in enumerate(result.decodings, start=1))
    return facts(
        [
            ("residual |f(x) − z|", f"largest {largest:.1e}, mean {mean:.1e}"),
            (
                "time",
                f"{result.seconds:.2f} s{each}{', a first trial of decodings included' if result.calibrated else ''}",
            ),
            ("decoding", decodings),
        ]
    )
