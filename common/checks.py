"""The one way in which settings are refused, and ranges of numbers that stand beside the fields of settings.

A field says its range in its type, and the settings check themselves when they are built:

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        steps: AtLeastOne = 1000
        noise_std: NotNegative = 0.3
        decays: Annotated[list[float], below_one] = field(default_factory=list)

        def __post_init__(self) -> None:
            check_ranges(self, "train")  # "train.steps must be at least 1, got 0"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


def check(condition: bool, message: str) -> None:
    """An error with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Range:
    """What a number must be: ``holds`` says whether it is, and ``words`` what is expected ("at least 1")."""

    holds: Callable[[Any], bool]
    words: str

    def __repr__(self) -> str:  # in help texts
        return self.words

    def check(self, name: str, value: Any) -> None:
        """An error that names the value if it, or one of a list, is outside. None is no number, and always right."""
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in numbers:
            check(number is None or self.holds(number), f"{name} must be {self.words}, got {value}")


def at_least(least: float, note: str = "") -> Range:
    """Numbers from ``least`` on; the note, such as "(off)", stands behind it."""
    return Range(lambda number: number >= least, f"at least {least}{note and f' {note}'}")


def multiple_of(step: int) -> Range:
    """``step``, twice of it, and so on."""
    return Range(lambda number: number >= step and number % step == 0, f"a multiple of {step}")


positive = Range(lambda number: number > 0, "positive")
not_negative = Range(lambda number: number >= 0, "0 or positive")
off_or_positive = Range(lambda number: number >= 0, "0 (off) or positive")
fraction = Range(lambda number: 0 <= number <= 1, "in [0, 1]")
below_one = Range(lambda number: 0 <= number < 1, "in [0, 1)")

#: Types of fields.
AtLeastOne = Annotated[int, at_least(1)]
OffOrPositive = Annotated[int, off_or_positive]
#: Steps between two doings of something; 0 is never.
Interval = OffOrPositive
Count = Annotated[int, not_negative]
Positive = Annotated[float, positive]
NotNegative = Annotated[float, not_negative]
Fraction = Annotated[float, fraction]
BelowOne = Annotated[float, below_one]


def check_ranges(settings: Any, section: str = "") -> None:
    """Check each field of a dataclass that has a range; a class that gives a field anew keeps the range that it had.

    Args:
        settings: the dataclass, with values in its fields.
        section: where the user sets them, "train" for "train.steps".

    Raises:
        ValueError: that names the first value outside of its range.
    """
    begin = section and f"{section}."
    for name, found in ranges_of(settings.__class__):
        found.check(begin + name, getattr(settings, name))


@cache
def ranges_of(kind: type[Any]) -> tuple[tuple[str, Range], ...]:
    """The ranges of a dataclass's fields by name, in the fields' order."""
    found: dict[str, list[Range]] = {}
    for parent in reversed(kind.__mro__):
        own = inspect.get_annotations(parent)
        hints = get_type_hints(parent, include_extras=True) if own else {}
        for name in own:
            if ranges := list(in_hint(hints[name])):
                found[name] = ranges
    return tuple((field.name, one) for field in fields(kind) for one in found.get(field.name, ()))


def in_hint(hint: Any) -> Iterator[Range]:
    """Ranges in a type, also of its parts: ``Positive | None``, ``list[Positive]``."""
    if get_origin(hint) is Annotated:
        yield from (part for part in hint.__metadata__ if isinstance(part, Range))
    for part in get_args(hint):
        yield from in_hint(part)
