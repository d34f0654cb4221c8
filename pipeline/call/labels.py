"""Classes by name."""

from __future__ import annotations

from collections import Counter


def labels_by_name(id2label: dict[int, str] | dict[str, str] | None) -> dict[str, int]:
    """Indices of classes by their names in small letters, or as they are where classes differ in capitals alone."""
    names = {int(index): name for index, name in (id2label or {}).items()}
    small = Counter(name.lower() for name in names.values())
    return {name.lower() if small[name.lower()] == 1 else name: index for index, name in names.items()}


def label_of(name: str, names: dict[str, int]) -> int | None:
    """The index of a class, whose name may be written in small letters or capitals; None if there is no such class."""
    return names.get(name, names.get(name.lower()))
