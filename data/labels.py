"""Class labels of a data set's column: named classes, numbers, or texts."""

from __future__ import annotations

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
        if largest >= MOST_CLASSES:
            raise ValueError(f"{place} has the value {largest}, too large for a class number: count classes from 0 on")
        return cls(column, place, [str(number) for number in range(largest + 1)], None)

    def check(self, data: datasets.Dataset, split: str) -> None:
        """Whether the rows that are used have values, and texts that are classes.

        Raises:
            ValueError: that names the column, and the first row or text which does not fit.
        """
        values = column_values(data, self.column, self.place)
        if empty := [row for row, value in enumerate(values) if value is None]:
            raise ValueError(
                f"{self.place} is empty in {len(empty)} of {len(values)} rows of the split {split!r}, first {empty[0]}: "
                "leave these rows out with data.where, or give them a class"
            )
        if self.texts is not None and (new := sorted(set(values) - self.texts.keys())):
            raise ValueError(f"{self.place} has in the split {split!r} the class {new[0]!r}, which training lacks")

    def number(self, value: Any, name: str) -> int:
        """The class number of a row's value; ``name`` is the row's, for messages."""
        if self.texts is not None:
            return self.texts[value]
        label = class_number(value, self.place)
        if not 0 <= label < len(self.classes):
            raise ValueError(f"the label of {name} is {label}, expected 0 to {len(self.classes) - 1}")
        return label


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
    """A number that stands for a class; those with a fraction of 0 are whole."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError(f"{place} has the value {value!r}, expected whole numbers from 0 on, or texts")
