"""Trackers: which are known, and what each is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType
from trainings import train

from tarflow.training.loop.accelerator import make_accelerator
from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.loop.trackers import check_trackers, start_trackers


def test_trackers_that_are_not_there(tmp_path: Path) -> None:
    check_trackers(["tensorboard", "all"], "trackers")
    with pytest.raises(ValueError, match=r"log\.trackers has 'paper', which is no tracker of Accelerate: it knows aim"):
        train(tmp_path / "run", "--log.trackers", '["paper"]')
    missing = "clearml"
    with pytest.raises(ValueError, match="trackers has 'clearml', which is not installed"):
        make_accelerator(NetworkConfig(mixed_precision="no", trackers=[missing]).loop(tmp_path))
    assert list(tmp_path.iterdir()) == []


class Started:
    """As an accelerator, which notes what it starts."""

    def __init__(self) -> None:
        self.log_with: list[Any] = [LoggerType.TENSORBOARD, LoggerType.WANDB, LoggerType.MLFLOW]
        self.trackers: list[Any] = []
        self.asked: dict[str, tuple[Any, ...]] = {}

    def init_trackers(self, project: str, *given: Any) -> None:
        self.trackers = list(self.log_with)
        self.asked[str(self.log_with[0])] = (project, *given)


def test_trackers_are_told_project_name_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    accelerator: Any = Started()
    wanted = list(accelerator.log_with)
    resolved = "output: run\ndata: {path: null, weights: [1, 2]}\ntrain: {steps: 5, noise_std: 0.3}\n"
    start_trackers(accelerator, tmp_path / "night", resolved)
    flat = {"output": "run", "data.path": "null", "data.weights": "[1, 2]", "train.steps": 5, "train.noise_std": 0.3}
    assert accelerator.asked == {
        "tensorboard": ("logs",),
        "wandb": ("tarflow", flat, {"wandb": {"name": "night"}}),
        "mlflow": ("tarflow", flat, {"wandb": {"name": "night"}}),
    }
    assert accelerator.log_with == accelerator.trackers == wanted
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    start_trackers(accelerator, tmp_path, resolved)
    assert accelerator.asked["wandb"][0] == "mine"
