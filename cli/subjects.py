"""What is to be drawn, by the options of `tarflow generate`; nothing here takes long to import."""

from __future__ import annotations

import argparse
from typing import Any

from tarflow.pipeline.call.labels import FEW, did_you_mean, label_of, labels_by_name
from tarflow.pipeline.loading.place import Facts


def subjects_of(facts: Facts, args: argparse.Namespace) -> tuple[str, list[Any]]:
    """What each row of pictures is of: the name of the pipeline's argument, and its values."""
    conditioning = facts.conditioning
    if conditioning == "prefix":
        if args.classes:
            raise ValueError(
                'this pipeline draws from captions and has no classes: give one, for example "a red heart, noto style"'
            )
        if not args.prompt:
            raise ValueError('this pipeline draws from captions: give one, for example "a red heart, noto style"')
        return "prompt", args.prompt
    if args.prompt or args.negative_prompt:
        instead = "leave them out" if conditioning == "none" else f"give --class, {some_classes(facts)}"
        raise ValueError(f"this pipeline takes no captions: {instead}")
    if conditioning == "none":
        if args.classes:
            raise ValueError("this pipeline has no classes: leave --class out")
        return "num_images", [1]
    if not args.classes:
        raise ValueError(f"this pipeline draws classes: give --class, {some_classes(facts)}")
    return "class_labels", [class_index(facts, text) for text in args.classes]


def class_index(facts: Facts, text: str) -> int:
    """The class of a name, or else of a number."""
    count, known = facts.num_classes, labels_by_name(facts.names)
    if (index := label_of(text, known)) is not None:
        return index
    if text.isascii() and text.isdigit() and int(text) < count:
        return int(text)
    hint = did_you_mean(text, known) or f"the pipeline has {some_classes(facts)}"
    raise ValueError(f"unknown class {text!r}; {hint}")


def some_classes(facts: Facts, most: int = FEW) -> str:
    """The first names of a pipeline's classes, and their numbers; of many, where the others are."""
    known = list(labels_by_name(facts.names))
    names = ", ".join(known[:most]) + (", …" if len(known) > most else "")
    numbers = f"0 to {facts.num_classes - 1}"
    numbers += "; id2label in its model_index.json has all names" if len(known) > most else ""
    return f"{names} (or {numbers})" if names else numbers
