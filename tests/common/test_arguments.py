"""Settings from files and command lines."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tarflow.cli.fid import CalcConfig, RefConfig, RunConfig
from tarflow.common.arguments import config_first, parse_dataclass
from tarflow.evaluation.reports.settings import ReportConfig, SweepConfig
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.experiments.settings import ComparisonConfig, StudentComparisonConfig
from tarflow.training.flow.arguments import parse_config


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the tests.

    Attributes:
        count: one.
        share: another.
        names: some.
        way: of two.
        flag: yes or no.
    """

    count: int = 1
    share: float | None = None
    names: list[str] | None = None
    way: Literal["left", "right"] = "left"
    flag: bool = False


def test_what_is_typed_counts_more_than_the_file_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("count: 2\nway: right\n")
    (tmp_path / "b.yaml").write_text("way: left\n")
    file = str(tmp_path / "a.yaml")
    for argv in (
        ["--count", "3", "--config", file],
        ["--config", file, "--count", "3"],
        ["--count=3", f"--config={file}"],
    ):
        assert parse_dataclass(Settings, argv)[0] == Settings(count=3, way="right")
    both = ["--config", file, "--config", str(tmp_path / "b.yaml")]  # the later file counts more
    assert parse_dataclass(Settings, both)[0] == Settings(count=2, way="left")
    assert config_first(["a", "--config"]) == ["a", "--config"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "1.5", "count must be a whole number, got '1.5'"),
        ("share", "x", "share must be a number or null, got 'x'"),
        ("names", "3", "names must be a list, such as '[1, 2]' or null, got '3'"),
        ("way", "up", "way must be one of 'left', 'right', got 'up'"),
        ("flag", "maybe", "flag must be true or false, got 'maybe'"),
    ],
)
def test_wrong_types_are_said_in_words(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_dataclass(Settings, [f"--{name}", value])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont: 2", "there is no setting cuont; did you mean count? Take it out of the file that --config names"),
        ("old: {weight: 0.0, sweeps: 8}", "there is no setting old: take it out of the file that --config names"),
    ],
)
def test_settings_of_files_that_there_are_not_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text + "\n")
    with pytest.raises(ValueError) as error:
        parse_dataclass(Settings, ["--config", str(tmp_path / "a.yaml")])
    assert str(error.value) == message


def test_a_section_that_there_was_is_named_whole(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {sweep_loss: {weight: 0.0, sweeps: 8}, steps: 3}\n")
    with pytest.raises(ValueError, match=r"^there is no setting train\.sweep_loss[:;]"):
        parse_config(["--config", str(tmp_path / "a.yaml")])


def test_other_messages_stay() -> None:
    with pytest.raises(ValueError, match="nothing"):
        parse_dataclass(Settings, ["--nothing", "1"])


@pytest.mark.parametrize(
    "kind",
    [
        *(GenerationConfig, SweepConfig, ReportConfig, ComparisonConfig, StudentComparisonConfig),
        *(RefConfig, CalcConfig, RunConfig),
    ],
)
def test_types_of_inherited_settings_are_known(kind: type, capsys: pytest.CaptureFixture) -> None:
    """A type whose name the module of a class does not know would be taken as any, and nothing refused."""
    with pytest.raises(SystemExit):
        parse_dataclass(kind, ["--help"])
    shown = capsys.readouterr().out
    assert "--extractor" in shown or "--guidance_scale" in shown
    assert "Unvalidated" not in shown


@pytest.mark.parametrize("setting", ["--guidance_scale=0.5", "--seed=-1", "--noise_std=-0.1", "--noise_std=inf"])
def test_ranges_of_inherited_settings(setting: str) -> None:
    name = setting.strip("-").partition("=")[0]
    for kind in (GenerationConfig, ReportConfig):
        needed = ["--pipeline=x", "--out=x", "--data.source=drawings"]
        with pytest.raises(ValueError, match=f"{name} must be "):
            parse_dataclass(kind, [*needed, setting])


def test_options_are_listed_without_heavy_imports() -> None:
    """`tarflow generate` refuses a wrong option before PyTorch is imported, which takes seconds."""
    code = "import sys, tarflow.cli.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
