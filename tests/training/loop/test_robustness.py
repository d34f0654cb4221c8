"""Trainings that are stopped at any instant, and go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import fresh_process
from processes import CONTEXT
from safetensors.torch import load_file
from torch import Tensor
from trainings import CLASS_FLOW, SMALL

from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.trainer import flow_trainer
from tarflow.training.loop.checkpoint import checkpoints
from tarflow.training.loop.trainer import Trainer

STEPS, KILLS = 12, 10
ARGUMENTS = ["--data", "{}", "--flow", CLASS_FLOW, *SMALL, "--train.steps", str(STEPS), "--log.checkpoint_every", "2"]


def run_training(
    folder: str, largest_file: int | None = None, kill_in_checkpoint: int | None = None, terminate_at: int | None = None
) -> None:
    """A training in a process of its own, from the latest checkpoint on.

    Args:
        folder: of the run.
        largest_file: in bytes; writing more fails, as on a full disk.
        kill_in_checkpoint: the number of a checkpoint in whose middle the process kills itself.
        terminate_at: a step in which it gets a SIGTERM.
    """
    fresh_process()
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (progress bars)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill_in_checkpoint is not None:
        whole, number = Accelerator.save_state, [0]

        def half(self: Accelerator, path: str) -> None:
            whole(self, path)
            number[0] += 1
            if number[0] == kill_in_checkpoint:
                os.kill(os.getpid(), signal.SIGKILL)

        Accelerator.save_state = half
    if terminate_at is not None:
        train_step = Trainer.train_step

        def terminated(self: Trainer, batches: Any) -> Any:
            if self.step + 1 == terminate_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(self, batches)

        Trainer.train_step = terminated
    flow_trainer(*parse_config([*ARGUMENTS, "--output", folder, "--resume", "auto"])).run()


def start(folder: Path, **options: int) -> BaseProcess:
    process = CONTEXT.Process(target=run_training, args=(str(folder),), kwargs=options)
    process.start()
    return process


def finish(folder: Path, **options: int) -> int:
    """Run to the end; returns the exit status."""
    process = start(folder, **options)
    process.join(100)
    return process.exitcode


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pipeline" / "flow" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], float]:
    """The weights to arrive at, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    began = time.perf_counter()
    assert finish(folder / "run") == 0
    return weights(folder / "run"), time.perf_counter() - began


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_killed_at_ten_instants(tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], float]) -> None:
    expected, seconds = uninterrupted
    instants = random.Random(0)  # each time the same shares of a run's time, in which the machine decides where it is
    kills = runs = 0
    while kills < KILLS or runs == 0:
        folder = tmp_path / str(runs)
        process = start(folder)
        process.join(instants.uniform(0.1, 0.9) * seconds if kills < KILLS else 100)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        assert_same(folder, expected)
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step_{n:08d}" for n in (8, 10, 12)}
        runs += 1


def test_killed_in_a_checkpoint(tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], float]) -> None:
    assert finish(tmp_path, kill_in_checkpoint=3) == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step_00000002", "step_00000004"]
    assert finish(tmp_path) == 0
    assert_same(tmp_path, uninterrupted[0])


def test_full_disk(tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], float]) -> None:
    assert finish(tmp_path, kill_in_checkpoint=2) == -signal.SIGKILL
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoints" / "step_00000002").rglob("*"))
    assert finish(tmp_path, largest_file=largest - 1) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert finish(tmp_path) == 0
    assert_same(tmp_path, uninterrupted[0])


def test_sigterm_saves_and_exits_with_success(tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], float]) -> None:
    assert finish(tmp_path, terminate_at=7) == 0
    assert not (tmp_path / "pipeline").exists()
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000007"
    assert finish(tmp_path, terminate_at=STEPS) == 0  # the last checkpoint is saved, and not more
    assert not (tmp_path / "pipeline").exists()
    assert finish(tmp_path) == 0
    assert_same(tmp_path, uninterrupted[0])
