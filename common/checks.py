"""The one way in which settings are refused."""

from __future__ import annotations


def check(condition: bool, message: str) -> None:
    """An error with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(message)
