"""What a batch of data says of its pictures, as the flow takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.walk import resolve_level

LACKING = "the model takes {}, but the data has none: give data with them, or ask for no condition (likelihoods: --condition none)"


def check_class_names(pipe: FlowPipeline, names: Sequence[str] | None) -> None:
    """Whether the classes of data, by number, are those of a model that draws classes. Names that the model does not know are
    taken for other names of its own, if there are as many.

    Raises:
        ValueError: if a class has another number in the model, or there are more or fewer, some under unknown names.
    """
    if not pipe.flow.config.conditioning.startswith("class") or not names:
        return
    by_number = {int(number): name for number, name in (pipe.config.id2label or {}).items()}
    known = {name: number for number, name in by_number.items()}
    for number, name in enumerate(names):
        if name in known and by_number.get(number) != name:
            raise ValueError(
                f"the class {name!r} is number {known[name]} of the model, but {number} of the data: give data that has all "
                f"classes of the model, {len(by_number)}, in its order"
            )
    classes, unknown = pipe.flow.config.num_classes, [name for name in names if name not in known]
    if known and unknown and len(names) != classes:
        raise ValueError(
            f"the model has {classes} classes, and the data {len(names)}, of which the model does not know {unknown[0]!r}: give "
            "data of its classes"
        )


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
            raise ValueError(LACKING.format("captions"))
        captions = batch["caption"] if with_condition else [""] * count
        return {"cond": pipe.encoded_captions(captions).to(pipe._execution_device), **leveled}
    if kind == "none" or not with_condition:
        return leveled
    if "label" not in batch:
        raise ValueError(LACKING.format("class labels"))
    return {"class_labels": batch["label"].to(pipe.flow.device), **leveled}
