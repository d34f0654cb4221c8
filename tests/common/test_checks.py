"""Ranges that stand beside the fields of settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from tarflow.common.arguments import parse_dataclass
from tarflow.common.checks import (
    AtLeastOne,
    Count,
    Fraction,
    Interval,
    NotNegative,
    Positive,
    at_least,
    below_one,
    check_ranges,
    multiple_of,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a test.

    Attributes:
        steps: how many.
        lr: the peak.
    """

    steps: AtLeastOne = 10
    images: AtLeastOne | None = None
    lr: Positive = 1e-3
    noise: NotNegative = 0.0
    workers: Count = 0
    every: Interval = 0
    drop: Fraction = 0.1
    betas: Annotated[tuple[float, float], below_one] = (0.9, 0.95)
    decays: list[Annotated[float, below_one]] = field(default_factory=list)
    scale: Annotated[float, at_least(1, "(off)")] = 1.0
    width: Annotated[int, multiple_of(8)] = 16
    name: str = "any"

    def __post_init__(self) -> None:
        check_ranges(self, "train")


@dataclass(frozen=True, kw_only=True)
class Longer(Settings):
    """Of the same test: another default keeps the range, another range takes its place."""

    steps: int = 20
    scale: Annotated[float, at_least(0)] = 0.5
    own: Positive = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"steps": 0}, "train.steps must be at least 1, got 0"),
        ({"images": 0}, "train.images must be at least 1, got 0"),
        ({"lr": 0.0}, "train.lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "train.lr must be positive, got nan"),
        ({"noise": -0.5}, "train.noise must be 0 or positive, got -0.5"),
        ({"workers": -1}, "train.workers must be 0 or positive, got -1"),
        ({"every": -1}, "train.every must be 0 (off) or positive, got -1"),
        ({"drop": 1.5}, "train.drop must be in [0, 1], got 1.5"),
        ({"betas": (0.9, 1.0)}, "train.betas must be in [0, 1), got (0.9, 1.0)"),
        ({"decays": [0.5, 1.0]}, "train.decays must be in [0, 1), got [0.5, 1.0]"),
        ({"scale": 0.5}, "train.scale must be at least 1 (off), got 0.5"),
        ({"width": 12}, "train.width must be a multiple of 8, got 12"),
        ({"width": 0}, "train.width must be a multiple of 8, got 0"),
    ],
)
def test_a_value_outside_of_its_range_is_named(given: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        Settings(**given)
    assert str(error.value) == message


def test_edges_are_inside():
    Settings(steps=1, images=1, every=0, drop=1.0, betas=(0.0, 0.0), decays=[], scale=1.0, width=8)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"scale": -1.0}, "scale must be at least 0, got -1.0"),
        ({"own": 0.0}, "own must be positive, got 0.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
    ],
)
def test_a_class_keeps_the_ranges_of_its_parent(given: dict[str, Any], message: str):
    Longer()
    with pytest.raises(ValueError) as error:
        Longer(**given)
    assert str(error.value) == message


def test_command_lines_read_such_types(capsys: pytest.CaptureFixture[str]):
    settings, _ = parse_dataclass(Settings, ["--steps", "3", "--images", "null", "--betas", "[0.1,0.2]", "--lr", "1"])
    assert (settings.steps, settings.images, settings.betas, settings.lr) == (3, None, (0.1, 0.2), 1.0)
    with pytest.raises(ValueError, match=r"train\.steps must be at least 1, got 0"):
        parse_dataclass(Settings, ["--steps", "0"])
    with pytest.raises(ValueError, match="steps must be a whole number, got 'x'"):
        parse_dataclass(Settings, ["--steps", "x"])
    with pytest.raises(SystemExit):
        parse_dataclass(Settings, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the peak. (type: float, default: 0.001)" in shown
    assert "(type: int | null, default: null)" in shown
