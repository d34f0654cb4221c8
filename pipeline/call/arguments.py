"""Arguments of a wrong type, refused in one sentence before anything is computed with them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from tarflow.pipeline.call.checks import check_generator

Given = ParamSpec("Given")
Result = TypeVar("Result")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, also one of NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """The same for real numbers."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_switch(value: Any) -> bool:
    """Whether a value is True or False, or 1 or 0."""
    return isinstance(value, np.bool_) or (isinstance(value, Integral) and value in (0, 1))


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def is_text_or_texts(value: Any) -> bool:
    """Whether a value is a text, or a list of them."""
    return isinstance(value, str) or is_texts(value)


#: What an argument must be by its annotation without None, and that in words.
KINDS: dict[frozenset[Any], tuple[Callable[[Any], bool], str]] = {
    frozenset({int}): (is_whole, "a whole number"),
    frozenset({float}): (is_number, "a number"),
    frozenset({bool}): (is_switch, "True or False"),
    frozenset({Tensor}): (lambda value: isinstance(value, Tensor), "a tensor"),
    frozenset({list[str]}): (is_texts, "a list of texts"),
    frozenset({str, list[str]}): (is_text_or_texts, "a text or a list of texts"),
}


def check_argument(name: str, annotation: Any, value: Any) -> None:
    """An error for a value that is not of the type with which the argument is annotated. Choices, pictures and whatever else
    is not of `KINDS` is left to the method, which knows more.

    Raises:
        ValueError: that names argument, value, and what was expected.
    """
    if name == "generator":
        check_generator(value)
        return
    parts = frozenset(get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation])
    if value is None and NoneType in parts:
        return
    parts -= {NoneType}
    fits, words = KINDS.get(parts, (None, ""))
    if any(get_origin(part) is Callable for part in parts):
        fits, words = callable, "a function"
    if fits is not None and not fits(value):
        raise ValueError(f"{name} must be {words}, got {value!r}")


def check_types(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """A method that refuses arguments of a wrong type, see `check_argument`."""
    names = list(inspect.signature(method).parameters)
    annotations: dict[str, Any] = {}

    @functools.wraps(method)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not annotations:  # at the first call, when all names in them are known
            annotations.update(get_type_hints(method))
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            if name in annotations:
                check_argument(name, annotations[name], value)
        return method(*args, **kwargs)

    return checked
