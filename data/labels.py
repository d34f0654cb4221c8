"""Class labels of a data set's column: named classes, numbers, or texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from tarflow.data.config import DataConfig

#: More classes than this are no class numbers, but numbers of something else.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Labels:
    """How a column's values stand for classes.

    Attributes:
        column: its name.
        place: column and data set, for messages.
        classes: in the order of their numbers.
        texts: class numbers by the column's texts; None if its values are numbers.
    """

    column: str
    place: str
    classes: list[str]
    texts: dict[str, int] | None

    @classmethod
    def of_data(cls, data: datasets.Dataset, config: DataConfig) -> Labels:
        """The classes of a column: those that it names, the numbers up to the largest, or its texts in order.

        Raises:
            ValueError: if it has values of another type, no value at all, or numbers too large for classes.
        """
        column = config.label_column or ""
        place = f"data.label_column {column!r} of {config.name!r}"
        if names := list(getattr(data.features[column], "names", None) or []):
            return cls(column, place, names, None)
        values = set(column_values(data, column, place)) - {None}
        if not values:
            raise ValueError(f"{place} has no values")
        if all(isinstance(value, str) for value in values):
            classes = sorted(values)
            return cls(column, place, classes, {text: number for number, text in enumerate(classes)})
        largest = max(class_number(value, place) for value in values)
        if largest < 0:
            raise ValueError(f"{place} has no class number, its largest value is {largest}: count classes from 0 on")
        if largest >= MOST_CLASSES:
            raise ValueError(f"{place} has the value {largest}, too large for a class number: count classes from 0 on")
        return cls(column, place, [str(number) for number in range(largest + 1)], None)

    def check(self, data: datasets.Dataset, split: str, rows: Sequence[int]) -> None:
        """Whether the rows that are used have values, and all of them are classes.

        Args:
            data: these rows.
            split: its name, for messages.
            rows: their numbers in the split, for messages.

        Raises:
            ValueError: that names the column, and the first row which does not fit.
        """
        values = column_values(data, self.column, self.place)
        if empty := [row for row, value in zip(rows, values, strict=True) if value is None]:
            raise ValueError(
                f"{self.place} is empty in {len(empty)} of {len(values)} rows of the split {split!r}, first {empty[0]}: "
                "leave these rows out with data.where, or give them a class"
            )
        wrong = {value for value in set(values) if not self.has(value)}  # of the few values, not of the many rows
        if not wrong:
            return
        row, value = next((row, value) for row, value in zip(rows, values, strict=True) if value in wrong)
        if self.texts is not None:
            raise ValueError(
                f"{self.place} has in the split {split!r} the class {value!r}, which training lacks, first in row {row}: "
                "leave such rows out with data.where, or add some to training"
            )
        raise ValueError(
            f"{self.place} has in the split {split!r} the label {value!r}, first in row {row}, expected whole numbers "
            f"from 0 to {len(self.classes) - 1}, the classes of training: leave such rows out with data.where, or give "
            "them one of these"
        )

    def has(self, value: Any) -> bool:
        """Whether a value stands for a class."""
        if self.texts is not None:
            return value in self.texts
        return is_whole(value) and 0 <= value < len(self.classes)

    def number(self, value: Any) -> int:
        """The class number of a row's value, which `check` has seen."""
        return int(value) if self.texts is None else self.texts[value]


def column_values(data: datasets.Dataset, column: str, place: str) -> list[Any]:
    """The values of a column.

    Raises:
        ValueError: if they are no single numbers or texts.
    """
    feature = data.features[column]
    kind = getattr(feature, "dtype", "")
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)) or kind in ("binary", "large_binary"):
        raise ValueError(f"{place} holds no class numbers or texts: its type is {feature}")
    return data.select_columns([column])[:][column]


def class_number(value: Any, place: str) -> int:
    """A number that stands for a class."""
    if is_whole(value):
        return int(value)
    raise ValueError(f"{place} has the value {value!r}, expected whole numbers from 0 on, or texts")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; those with a fraction of 0 are."""
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
