"""Checkpoints that were cut off, as by a full disk or a broken copy, are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainings import train


def test_they_are_named(tmp_path: Path) -> None:
    run = ["--log.checkpoint_every", "2"]
    train(tmp_path, "--train.steps", "2", *run)
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    assert {"run.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"the checkpoint '.*step_00000002.*' cannot be read"):
            train(tmp_path, "--train.steps", "3", *run, "--resume", "latest")
        file.write_bytes(content)
    train(tmp_path, "--train.steps", "3", *run, "--resume", "latest")
