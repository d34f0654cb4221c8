"""Classes by name."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

#: So many names are read at a glance; of more classes an error names the nearest.
FEW = 12


def labels_by_name(id2label: dict[int, str] | dict[str, str] | None) -> dict[str, int]:
    """Indices of classes by their names in small letters, or as they are where classes differ in capitals alone. Names that
    several classes have, as ImageNet has two cranes, get their numbers: "crane 134"."""
    names = {int(index): name for index, name in (id2label or {}).items()}
    times = Counter(names.values())
    names = {index: name if times[name] == 1 else f"{name} {index}" for index, name in names.items()}
    small = Counter(name.lower() for name in names.values())
    return {name.lower() if small[name.lower()] == 1 else name: index for index, name in names.items()}


def label_of(name: str, names: dict[str, int]) -> int | None:
    """The index of a class, whose name may be written in small letters or capitals; None if there is no such class."""
    return names.get(name, names.get(name.lower()))


def did_you_mean(name: str, names: Iterable[str], most: int = 3) -> str:
    """A question that names the nearest classes: those that have the text in them, as ImageNet's have several words, then
    those that are spelled alike; "" if there are none."""
    known = {one.lower(): one for one in names}
    near = sorted((one for one in known if name.lower() in one), key=len) + difflib.get_close_matches(
        name.lower(), known, most
    )
    quoted = [repr(known[one]) for one in dict.fromkeys(near)][:most]
    choice = " or ".join(part for part in (", ".join(quoted[:-1]), *quoted[-1:]) if part)
    return choice and f"did you mean {choice}?"


def unknown_class(name: str, names: dict[str, int]) -> str:
    """A sentence on a class that a pipeline does not have: all that it has if they are few, else the nearest."""
    if len(names) <= FEW:
        return f"unknown class name {name!r}; known are {', '.join(names) or 'none: this pipeline has no names'}"
    question = did_you_mean(name, names)
    return f"unknown class name {name!r}; {question and f'{question} '}pipe.labels has all {len(names):,} names"
