"""The quick start's command; what it trains, draws and checks is tested with the parts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "draw_and_check", lambda config: {})
    return module


@pytest.mark.parametrize(
    ("typed", "resume"), [([], "auto"), (["--resume", "latest"], "latest"), (["--log.checkpoint_every", "5"], "auto")]
)
def test_an_interrupted_run_goes_on_and_the_next_is_a_new_one(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: list[str], resume: str
) -> None:
    seen: list[Any] = []

    class Run:
        def __init__(self, config: Any, resolved: str):
            seen.append(config)

        def run(self) -> dict[str, Any]:
            stopped = {"stopped": "SIGINT"} if len(seen) == 1 else {}
            Path(seen[0].output, "checkpoints", "step_00000003").mkdir(parents=True, exist_ok=True)
            return {"steps": 3, **stopped}

    monkeypatch.setattr(quickstart, "flow_trainer", Run)
    arguments = ["--output", str(tmp_path), *typed]
    with pytest.raises(SystemExit) as ended:
        quickstart.main(arguments)
    assert ended.value.code == 130 and (tmp_path / "checkpoints").is_dir()
    quickstart.main(arguments)
    assert [config.resume for config in seen] == [resume, resume]
    # With checkpoints off, only an interruption leaves one, which the whole run needs no more.
    assert (tmp_path / "checkpoints").is_dir() == ("--log.checkpoint_every" in typed)
