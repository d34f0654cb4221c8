"""Where trainings write: below the home folder, and beside what an earlier run has saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import files_of
from trainings import train

from tarflow.common.arguments import parse_dataclass
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.loop.checkpoint import find_checkpoint


def test_a_run_below_the_home_folder_is_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    often = ["--log.checkpoint_every", "1"]
    train("~/run", "--train.steps", "2", *often)
    assert not (tmp_path / "~").exists()
    run = tmp_path / "home" / "run"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "checkpoints", "pipeline"}
    trainer, _ = train("~/run", "--train.steps", "3", *often, "--resume", "latest")
    assert trainer.saved == run / "checkpoints" / "step_00000003"
    assert find_checkpoint(run / "checkpoints", "~/run/checkpoints/step_00000003") == trainer.saved
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        train("~/run", "--train.steps", "3", *often)


def test_an_autoencoders_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = '{"drawings": {"data": {"image_size": 32}}}'
    config, _ = parse_dataclass(TrainVaeConfig, ["--output", "~/vae", "--init_from", "taef2", "--sources", sources])
    assert config.folder == tmp_path / "vae_run"


def test_a_run_does_not_start_from_what_it_would_put_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, "--train.steps", "1")
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"^init_from is '.*', in the folder of this run, .*: give another output$"):
        train(folder, "--train.steps", "1", "--init_from", str(folder / "pipeline"))
    assert files_of(folder) == before


def test_what_an_earlier_run_saved_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    train(folder, "--train.steps", "1")
    first = files_of(folder / "pipeline")
    for name in ("samples", "logs"):
        (folder / name).mkdir()
        (folder / name / "old").touch()
    for seed in (1, 2):
        train(folder, "--train.steps", "1", "--train.seed", str(seed))
        assert f"what an earlier run saved in {folder} is in earlier_{seed} there" in capsys.readouterr().out
    assert files_of(folder / "earlier_1" / "pipeline") == first
    assert (folder / "earlier_1" / "samples" / "old").is_file() and (folder / "earlier_1" / "logs" / "old").is_file()
    settings = [(folder / name / "config.yaml").read_text() for name in ("earlier_1", "earlier_2", ".")]
    assert len(set(settings)) == 3
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "pipeline", "earlier_1", "earlier_2"}
