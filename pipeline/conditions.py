"""What a batch of data says of its pictures, as the flow takes it."""

from __future__ import annotations

from typing import Any

from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.walk import resolve_level


def condition_of(
    pipe: FlowPipeline,
    batch: dict[str, Any],
    count: int,
    with_condition: bool,
    noise_level: float | None = None,
) -> dict[str, Any]:
    """Keyword arguments of the flow for the data's labels or captions, or for none.

    Args:
        noise_level: of a flow of many levels; None is its highest.
    """
    kind, level = pipe.flow.config.conditioning, resolve_level(pipe.noise_levels, noise_level)
    leveled: dict[str, Any] = {} if level is None else {"noise_level": level}
    if kind == "prefix":
        if with_condition and "caption" not in batch:
            raise ValueError("the model takes captions, but the data has none; ask for no condition")
        captions = batch["caption"] if with_condition else [""] * count
        return {"cond": pipe.encode_prompt(captions, do_classifier_free_guidance=False)[0], **leveled}
    if kind == "none" or not with_condition:
        return leveled
    if "label" not in batch:
        raise ValueError("the model takes class labels, but the data has none; ask for no condition")
    return {"class_labels": batch["label"].to(pipe.flow.device), **leveled}
