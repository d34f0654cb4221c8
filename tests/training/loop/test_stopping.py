"""Errors of reading processes, signals, and errors of one process of several: all end a training within seconds."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from processes import start_script
from safetensors.torch import load_file
from torch.utils.data import Dataset
from trainings import CLASS_FLOW, SMALL, train

from tarflow.training.flow.task import FlowTask
from tarflow.training.loop import agreement
from tarflow.training.loop.agreement import agreed, main_alone
from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.batches import BatchReader, StepSampler, train_loader
from tarflow.training.loop.checkpoint import checkpoints
from tarflow.training.loop.network_task import NetworkTask, write_metrics
from tarflow.training.loop.stopping import Stopped, StopRequest, exit_status
from tarflow.training.loop.trainer import Trainer

#: Seconds that an end may take, on a machine where others work.
PROMPT = 30.0


class Pictures(Dataset):
    """Pictures of which one cannot be read."""

    def __init__(self, error: Exception | None = None, seconds: float = 0.0):
        self.error, self.seconds = error, seconds

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        if index == 7 and self.error is not None:
            raise self.error
        return {"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "skipped": []}


def reader(pictures: Dataset, workers: int = 2) -> BatchReader:
    sampler = StepSampler([range(len(pictures))], 50, 0, 1, 1, 0, 0, 100)
    return BatchReader(train_loader(pictures, workers, sampler))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("the label 77 is out of range"), "^the label 77 is out of range$"),
        (FileNotFoundError(2, "No such file or directory", "7.png"), r"No such file or directory.*7\.png"),
        (TypeError("'NoneType' object is not a picture"), "training data cannot be read: TypeError: .*not a picture"),
    ],
)
def test_errors_of_reading_processes_end_them(error: Exception, message: str, workers: int) -> None:
    with pytest.raises(ValueError, match=message), reader(Pictures(error), workers) as batches:
        processes = list(batches._readers)
        assert len(processes) == workers
        for _ in batches:
            began = time.monotonic()
    assert time.monotonic() - began < PROMPT
    assert all(not process.is_alive() for process in processes)


def test_reading_processes_outlive_signals_but_not_their_reader() -> None:
    with reader(Pictures(seconds=1.0)) as batches:  # fifty seconds for each batch
        processes = list(batches._readers)
        time.sleep(1.0)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert all(process.is_alive() for process in processes)
        began = time.monotonic()
    assert time.monotonic() - began < PROMPT
    assert all(not process.is_alive() for process in processes)


def wait_for(done: Any, process: BaseProcess, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i * 6, 255 - i * 6, 90)).save(path)
    return tmp_path


def command(folder: Path, *arguments: str) -> BaseProcess:
    """A training of the command line; what it prints goes to a file of the folder."""
    data = ["--data.source", "folder", "--data.path", str(folder / "images"), "--data.validation_fraction", "0"]
    settings = ["--flow", CLASS_FLOW, *SMALL, "--train.num_workers", "2", "--output", str(folder / "run")]
    return start_script("train_latent.py", [*data, *settings, *arguments], folder / "printed.txt")


def ended(process: BaseProcess, folder: Path) -> tuple[str, float]:
    """What it printed, and the seconds until it ended."""
    began = time.monotonic()
    process.join(60)
    seconds = time.monotonic() - began
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    return (folder / "printed.txt").read_text(encoding="utf-8"), seconds


def test_a_vanished_picture_ends_the_command(folder: Path) -> None:
    process = command(folder, "--train.steps", "100000", "--log.checkpoint_every", "1")
    wait_for(lambda: checkpoints(folder / "run" / "checkpoints"), process)
    for path in (folder / "images").rglob("*.png"):
        path.unlink()
    (folder / "images").rename(folder / "gone")
    printed, seconds = ended(process, folder)
    assert process.exitcode == 2, printed
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith("error: ")
    assert seconds < PROMPT


def test_ctrl_c_saves_a_checkpoint(folder: Path) -> None:
    process = command(folder, "--train.steps", "100000", "--log.checkpoint_every", "3")
    wait_for(lambda: checkpoints(folder / "run" / "checkpoints"), process)
    os.killpg(process.pid, signal.SIGINT)  # to readers too, as a terminal does
    printed, seconds = ended(process, folder)
    assert process.exitcode == 130, printed
    assert "Traceback" not in printed and "KeyboardInterrupt" not in printed
    last = checkpoints(folder / "run" / "checkpoints")[-1]
    step = int(last.name.removeprefix("step_"))
    assert f"stopped by SIGINT at step {step}: {last} is saved; go on with --resume latest" in printed
    assert seconds < PROMPT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("every", ["0", "5"])
def test_a_signal_in_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, every: str
) -> None:
    def slow(task: FlowTask, step: int, name: str = "held_out") -> dict[str, float]:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return {}

    options = ["--train.steps", "2", "--log.checkpoint_every", every]
    with monkeypatch.context() as patch:
        patch.setattr(FlowTask, "evaluate", slow)
        began = time.monotonic()
        _, metrics = train(tmp_path, *options)
        assert time.monotonic() - began < 40
    assert metrics == {"steps": 2, "stopped": number.name}
    assert exit_status(metrics) == (130 if number == signal.SIGINT else 0)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]
    assert signal.getsignal(number) is not None
    _, metrics = train(tmp_path, *options, "--resume", "latest")
    assert "latent_nats_per_dim" in metrics
    assert (tmp_path / "pipeline").is_dir()


def signal_in_copy(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A SIGTERM in the copy of that number of averages to weights, or back, before it copies anything."""
    copies, copy = [0], WeightAverages._copy

    def copied(averages: WeightAverages, values: Any) -> None:
        copies[0] += 1
        if copies[0] == number:
            signal.raise_signal(signal.SIGTERM)
        copy(averages, values)

    monkeypatch.setattr(WeightAverages, "_copy", copied)


@pytest.mark.parametrize(("copy", "step", "every"), [(1, 1, "1"), (2, 2, "1"), (1, 2, "0")])
def test_a_signal_while_weights_are_averaged_saves_the_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: int, step: int, every: str
) -> None:
    options = ["--train.steps", "2" if every == "0" else "3", "--log.eval_every", every]
    train(tmp_path / "whole", *options, "--log.checkpoint_every", "1")
    signal_in_copy(monkeypatch, copy)
    _, metrics = train(tmp_path / "stopped", *options)
    assert metrics == {"steps": step, "stopped": "SIGTERM"}
    name = f"checkpoints/step_{step:08d}/model.safetensors"
    whole, stopped = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


@pytest.mark.parametrize("copy", [1, 2])
def test_a_signal_while_a_networks_weights_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: int
) -> None:
    weight = torch.nn.Parameter(torch.full((3,), 5.0))
    averages = WeightAverages([weight], [0.9])
    averages.models[0].shadow_params = [torch.zeros(3)]
    task: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, log=lambda *_: None),
        learner=SimpleNamespace(model=torch.nn.Identity()),
        measure=lambda step, last: {"mean": float(weight.mean())},
        metrics=tmp_path / "metrics.jsonl",
    )
    task.report = lambda step, average, last: NetworkTask.report(task, step, average, last)
    stepper = SimpleNamespace(settle=lambda: None)
    trainer: Any = SimpleNamespace(averages=averages, task=task, step=1, stepper=stepper)
    signal_in_copy(monkeypatch, copy)
    with StopRequest() as stop:
        if copy == 1:
            with pytest.raises(Stopped):
                Trainer.report(trainer, stop, True)
        else:
            assert Trainer.report(trainer, stop, True)["mean"] == 0
    assert weight.tolist() == [5.0, 5.0, 5.0]


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tarflow.training.loop.stopping.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] = 0.5
        signal.raise_signal(signal.SIGINT)  # of the launcher
        assert stop.received == "SIGINT"
        now[0] = 5.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            pass
        with stop.at_once(False):
            pass
    with StopRequest() as stop, pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        signal.raise_signal(signal.SIGTERM)


class TwoProcesses:
    """One of two, for what `agreed` and `main_alone` ask of an accelerator."""

    num_processes = 2

    def __init__(self, is_main_process: bool = True):
        self.is_main_process = is_main_process


def in_pair(monkeypatch: pytest.MonkeyPatch, work: Any) -> list[Any]:
    """What `main_alone` gives or raises in both processes, as threads."""
    barrier, values, results = threading.Barrier(2), {}, [None, None]

    def gathered(value: str) -> list[str]:
        values[threading.current_thread().name] = value
        barrier.wait(20)
        return [values[name] for name in sorted(values)]

    def run(index: int) -> None:
        state: Any = TwoProcesses(is_main_process=index == 0)
        try:
            results[index] = main_alone(state, work)
        except Exception as error:  # noqa: BLE001
            results[index] = error

    with monkeypatch.context() as patch:
        patch.setattr(agreement, "gather_objects", gathered)
        threads = [threading.Thread(target=run, args=(index,), name=str(index)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    return results


def test_an_error_of_the_main_process_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("pipeline")

    main, other = in_pair(monkeypatch, broken)
    assert isinstance(main, KeyError)
    assert isinstance(other, ValueError) and "the main process stopped" in str(other)
    assert in_pair(monkeypatch, lambda: 3) == [3, None]
    alone: Any = SimpleNamespace(num_processes=1)
    assert main_alone(alone, lambda: 4) == 4


def test_processes_hear_of_each_others_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = TwoProcesses()
    monkeypatch.setattr(agreement, "gather_objects", lambda value: [value, "the disk is full"])
    with pytest.raises(ValueError, match="the disk is full"):
        agreed(state, lambda: 1)
    own = []

    def fails() -> None:
        raise OSError("my own")

    monkeypatch.setattr(agreement, "gather_objects", lambda value: own.append(value) or [value, ""])
    with pytest.raises(OSError, match="my own"):
        agreed(state, fails)
    assert own == ["my own"]
    monkeypatch.setattr(agreement, "gather_objects", lambda value: [value, ""])
    assert agreed(state, lambda: 1) == 1


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_metrics_lines_are_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30, 20):
        write_metrics(path, {"step": step, "psnr": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [10, 20]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
