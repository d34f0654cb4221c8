"""Pieces of the page: pictures inside the text itself, so that no file is written for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from tarflow.demo.drawing import Progress, Result, Stage

#: Longer sides of the pictures of a strip are made smaller than this before they are sent.
STRIP_SIDE = 192


def data_uri(image: Image.Image) -> str:
    """A picture as the address of an <img>."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def img(image: Image.Image, text: str, crisp: bool = False) -> str:
    """An <img>; ``text`` for those who do not see it, ``crisp`` for numbers rather than a picture."""
    kind = ' class="crisp"' if crisp else ""
    return f'<img src="{data_uri(image)}" alt="{escape(text)}"{kind}>'


def figure(image: Image.Image, caption: str, crisp: bool = False) -> str:
    return f"<figure>{img(image, caption, crisp)}<figcaption>{escape(caption)}</figcaption></figure>"


def sentence(text: str, kind: str = "error") -> str:
    """What went wrong, or (of another kind) what there is to say."""
    return f'<p class="sentence {kind}" role="alert">{escape(text)}</p>'


def progress(state: Progress) -> str:
    """A bar, what is computed, and since when."""
    return (
        f'<div class="progress"><progress max="1" value="{state.fraction:.3f}"></progress>'
        f"<span>{escape(state.message)}</span><span>{state.seconds:.1f} s</span></div>"
    )


def pictures(images: Sequence[Image.Image]) -> str:
    """Drawings, as large as there is room."""
    size = {1: "one", 2: "two"}.get(len(images), "many")
    cells = "".join(img(image, f"drawing {number}") for number, image in enumerate(images, start=1))
    return f'<div class="pictures {size}">{cells}</div>'


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
