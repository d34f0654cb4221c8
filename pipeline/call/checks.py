"""Arguments of a call that would have no effect, or none that was meant: one sentence for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, Decoding
from tarflow.flows.layers.guidance import Guidance

#: Ways to decode, by a call's name, that take a tolerance.
WITH_TOLERANCE = ("auto", "jacobi", "gs_jacobi")


def check_kind(kind: str, captions: Mapping[str, Any], classes: Mapping[str, Any]) -> None:
    """Whether what is given of captions, and of classes, is for a flow with the conditioning ``kind``.

    Args:
        captions, classes: by name; None was not given.

    Raises:
        ValueError: that names the first one that is not.
    """
    for wanted, given in (("prefix", captions), ("class", classes)):
        for name, value in given.items():
            if value is not None and not kind.startswith(wanted):
                raise ValueError(f"this model has the conditioning {kind!r} and takes no {name}")


def check_guidance_scale(scale: float) -> None:
    """Whether a scale is one of guidance."""
    if not 1 <= scale < math.inf:
        raise ValueError(f"guidance_scale must be at least 1 (off), got {scale}")


def check_counts(kind: str, num_images: int | None, num_images_per_prompt: int) -> None:
    """Whether a call's numbers of images are such, and meant for a flow with the conditioning ``kind``."""
    for name, value in (("num_images", num_images), ("num_images_per_prompt", num_images_per_prompt)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if num_images is not None and kind != "none":
        what = "captions" if kind == "prefix" else "classes"
        raise ValueError(
            f"num_images is for models without conditions, and this one draws from {what}: say "
            f"num_images_per_prompt={num_images}"
        )


def check_negative(
    kind: str, negative_prompt: str | list[str] | None, negative_embeds: Tensor | None, scale: float, callback: bool
) -> None:
    """Whether what guidance leads away from can have an effect; ``callback`` if one may turn guidance on."""
    check_kind(kind, {"negative_prompt_embeds": negative_embeds}, {})
    if negative_prompt is not None and negative_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    named = {"negative_prompt": names_text(negative_prompt), "negative_prompt_embeds": negative_embeds is not None}
    for name, given in named.items():
        if given and scale <= 1 and not callback:
            raise ValueError(
                f"{name} has no effect without guidance, and guidance_scale is {scale:g}: take one above 1, or leave "
                f"{name} out"
            )


def check_texts(name: str, texts: str | list[str] | tuple[str, ...] | None) -> None:
    """Whether texts are one, or a list of some."""
    if isinstance(texts, tuple) or texts == []:
        raise ValueError(f"{name} must be a text or a list of texts, got {texts!r}")


def names_text(texts: str | list[str] | None) -> bool:
    """Whether a text, or one of several, is not empty."""
    return any(texts) if isinstance(texts, list) else bool(texts)


def check_guided(kind: str, scale: float | None, own: float, guidance: Guidance, callback: bool) -> None:
    """Whether what is asked of guidance can have an effect; where a call leaves the scale to the pipeline, its options are for
    those pipelines that guide.

    Args:
        scale: of the call; None is the pipeline's own.
        own: the pipeline's, which is no wish of the caller's.
        guidance: of the call, with its other options.
        callback: whether one may turn guidance on.

    Raises:
        ValueError: that names the first that cannot.
    """
    if scale is None:
        return
    if kind == "none" and scale not in (1, own) and guidance.temperature == 1:
        raise ValueError(
            f"guidance_scale is {scale:g}, but this model draws without conditions, so there is nothing to lead away from: leave "
            "it out"
        )
    if scale > 1 or callback:
        return
    given = {
        "guidance_parts": (guidance.parts, "ab"),
        "guidance_annealed": (guidance.annealed, False),
        "attention_temperature": (guidance.temperature, 1),
        "guidance_blocks": (guidance.blocks, "all"),
    }
    for name, (value, usual) in given.items():
        if value != usual:
            raise ValueError(f"{name} has no effect without guidance, and guidance_scale is {scale:g}: leave it out")


def check_caption_options(kind: str, max_sequence_length: int | None, embeds: Tensor | None = None) -> None:
    """Whether options of captions are given to a model that has captions, and not with encoded ones."""
    if max_sequence_length is None:
        return
    check_kind(kind, {"max_sequence_length": max_sequence_length}, {})
    if max_sequence_length < 1:
        raise ValueError(f"max_sequence_length must be at least 1, got {max_sequence_length}")
    if embeds is not None:
        raise ValueError("max_sequence_length has no effect on prompt_embeds, which are encoded: leave it out")


def check_generator(generator: Any, images: int | None = None) -> None:
    """Whether random numbers come from torch's generators, and not from a bare seed; of a list, whether it has one for each
    of so many ``images``, where their number is known."""
    if isinstance(generator, tuple):
        raise ValueError("generator is a tuple, expected a torch.Generator or a list of them: give list(generator)")
    if generator is None:
        return
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator):
            seed = one if isinstance(one, int) else "SEED"
            raise ValueError(
                f"generator must be a torch.Generator, got {one!r}: give torch.Generator().manual_seed({seed})"
            )
    if isinstance(generator, list) and images is not None and len(generator) != images:
        raise ValueError(f"got {len(generator)} generators for {images} images; give one, or one for each image")


def check_decoding(decoding: str | Decoding | list[Decoding], tolerance: float | None, segment: int | None) -> None:
    """Whether tolerance and segment are for this way to decode; the default tolerance may be given with any."""
    listed = decoding if isinstance(decoding, list | tuple) else [decoding]
    if not isinstance(decoding, str) and not all(isinstance(one, Decoding) for one in listed):
        raise ValueError(f"decoding must be a name, a Decoding, or a list of one for each block, got {decoding!r}")
    name = decoding if isinstance(decoding, str) else None
    what = f"decoding={name!r}" if name is not None else "a Decoding, which has its own"
    if segment is not None and name != "gs_jacobi":
        raise ValueError(f"segment is for decoding='gs_jacobi', and has no effect with {what}: leave it out")
    if tolerance not in (None, DEFAULT_TOLERANCE) and name not in WITH_TOLERANCE:
        names = ", ".join(repr(one) for one in WITH_TOLERANCE)
        raise ValueError(f"tolerance is for decoding {names}, and has no effect with {what}: leave it out")
