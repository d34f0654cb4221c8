"""A pipeline's settings, which are the defaults of its calls: checked as it is made, as plain numbers that can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tarflow.common.checks import check
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.trajectory.kinds import FlowModel
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.pipeline.call.arguments import is_number, is_whole
from tarflow.pipeline.call.checks import check_guidance_scale
from tarflow.pipeline.call.choices import DECODERS
from tarflow.pipeline.call.trajectory_sampling import check_trained
from tarflow.pipeline.call.walk import resolve_steps
from tarflow.vae.codec import LatentCodec


def checked_settings(
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
        latents_mean, latents_std and the others: as of `TARFlowPipeline`.

    Raises:
        ValueError: that names the first one that cannot be.
    """
    mean, std = (numbers(name, of) for name, of in (("latents_mean", latents_mean), ("latents_std", latents_std)))
    LatentCodec(None, mean, std)  # an error for statistics that cannot be
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
        "noise_std": plain(noise_std),
        "id2label": names_of_classes(id2label),
        "max_sequence_length": plain(max_sequence_length),
        "guidance_scale": plain(guidance_scale),
        "guidance_method": guidance_method,
        "caption_template": caption_template,
        "decoder": decoder,
        "denoise": bool(denoise),
    }


def plain(number: Any) -> Any:
    """A number of NumPy as Python's, which can be saved; Python's own as it is, as it is part of a pipeline's hash."""
    return number.item() if isinstance(number, np.generic) else number


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
    return [plain(value) for value in listed]


def names_of_classes(names: Mapping[Any, str] | None) -> dict[Any, str] | None:
    """Names of classes by number.

    Raises:
        ValueError: if that is not what they are.
    """
    if names is None:
        return None
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label must be a dictionary of names by number, got {type(names).__name__}")
    found: dict[Any, str] = {}
    for number, name in names.items():
        if not (is_whole(number) or (isinstance(number, str) and number.isdecimal())):
            raise ValueError(f"id2label must have the classes' numbers as keys, got {number!r}")
        found[number if isinstance(number, str) else int(number)] = name
    return found


def default_steps(flow: FlowModel, levels: Sequence[float] | None, steps: int) -> int:
    """A pipeline's own ``num_inference_steps``: those from noise level to noise level, or along a trajectory one of the numbers
    that its model was trained with; 1 there leaves the choice to the model.

    Raises:
        ValueError: for a number that its flow cannot take.
    """
    if isinstance(flow, TrajectoryFlowModel) and steps > 1:
        check_trained(flow, steps)
        return int(steps)
    return resolve_steps(levels, steps, 1, True, None)
