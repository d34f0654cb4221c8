"""A pipeline's settings, which are the defaults of its calls: checked as it is made, as plain numbers that can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tarflow.common.checks import check
from tarflow.flows.layers.guidance import Guidance
from tarflow.pipeline.call.arguments import is_number, is_whole
from tarflow.pipeline.call.checks import check_guidance_scale
from tarflow.pipeline.call.choices import DECODERS


def checked_settings(
    flow: Any,
    *,
    latents_mean: Iterable[float] | None,
    latents_std: Iterable[float] | None,
    noise_std: float,
    id2label: Mapping[Any, str] | None,
    max_sequence_length: int,
    guidance_scale: float,
    guidance_method: str,
    caption_template: str | None,
    decoder: str,
    denoise: bool,
) -> dict[str, Any]:
    """Settings by name as `TARFlowPipeline` keeps them, numbers of NumPy and torch as Python's.

    Args:
        flow: of the pipeline; the others as of `TARFlowPipeline`.

    Raises:
        ValueError: that names the first one that cannot be.
    """
    mean, std = (numbers(name, of) for name, of in (("latents_mean", latents_mean), ("latents_std", latents_std)))
    check(std is None or min(std) > 0, f"latents_std must be positive, got {std}")
    check(0 <= noise_std < math.inf, f"noise_std must be 0 or positive, got {noise_std}")
    check(max_sequence_length >= 1, f"max_sequence_length must be at least 1, got {max_sequence_length}")
    check_guidance_scale(guidance_scale)
    Guidance(0.0, guidance_method)  # an error for one that there is not
    check(decoder in DECODERS, f"decoder must be 'vae' or 'finetuned', got {decoder!r}")
    check(
        caption_template is None or "{prompt}" in caption_template,
        f"caption_template has no place {{prompt}}, where the caption goes: {caption_template!r}",
    )
    return {
        "latents_mean": mean,
        "latents_std": std,
        "noise_std": float(noise_std),
        "id2label": names_of_classes(flow, id2label),
        "max_sequence_length": int(max_sequence_length),
        "guidance_scale": float(guidance_scale),
        "guidance_method": guidance_method,
        "caption_template": caption_template,
        "decoder": decoder,
        "denoise": bool(denoise),
    }


def numbers(name: str, values: Iterable[float] | None) -> list[float] | None:
    """Values as Python's numbers.

    Raises:
        ValueError: if they are none, or not finite.
    """
    if values is None:
        return None
    found = values.tolist() if hasattr(values, "tolist") else values
    listed = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else []
    if not listed or not all(is_number(value) and math.isfinite(value) for value in listed):
        raise ValueError(f"{name} must be finite numbers, one for each channel, got {values!r}")
    return [float(value) for value in listed]


def names_of_classes(flow: Any, names: Mapping[Any, str] | None) -> dict[Any, str] | None:
    """Names of classes by number.

    Raises:
        ValueError: if that is not what they are, or the flow has no class of a number.
    """
    if names is None:
        return None
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label must be a dictionary of names by number, got {type(names).__name__}")
    known = 0 if flow is None else flow.config.get("num_classes", 0)
    found: dict[Any, str] = {}
    for number, name in names.items():
        if not (is_whole(number) or (isinstance(number, str) and number.isdecimal())):
            raise ValueError(f"id2label must have the classes' numbers as keys, got {number!r}")
        if flow is not None and known and int(number) >= known:
            raise ValueError(f"id2label names the class {number}, but the flow's are 0 to {known - 1}")
        found[number if isinstance(number, str) else int(number)] = name
    return found
