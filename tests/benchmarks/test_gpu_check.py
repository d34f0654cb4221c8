"""The checks for a GPU: what is chosen, in which order and time, and what is written as it goes on."""

from __future__ import annotations

import gc
import json
import sys
import time
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow.benchmarks import gpu_report, gpu_runs, gpu_sampling
from tarflow.benchmarks.cards import TRAINING_GIB, largest_batch, training_batches, what_cards_can_do
from tarflow.benchmarks.choices import GPU_CHECKS, GPU_PARTS
from tarflow.benchmarks.gpu_checks import REPEATS, SMALL, Task, check_bfloat16, check_fast_steps, require
from tarflow.benchmarks.gpu_report import CHECKS, run_checks
from tarflow.benchmarks.gpu_runs import RUN, nats_after, write_drawings
from tarflow.benchmarks.gpu_sampling import check_calibration, check_profile, check_sampling
from tarflow.benchmarks.memory import training_memory
from tarflow.benchmarks.published_sampler import generate_as_published
from tarflow.benchmarks.random_models import random_model, shape_of
from tarflow.benchmarks.sampling import Comparison
from tarflow.cli.gpu_check import main
from tarflow.data.config import DataConfig
from tarflow.data.folder import ImageFolder


def test_three_calls_make_all_checks_in_their_minutes() -> None:
    assert CHECKS.keys() == GPU_CHECKS.keys()
    assert [name for part in (1, 2, 3) for name in GPU_PARTS[part]] == list(GPU_CHECKS)
    assert list(GPU_CHECKS)[:4] == ["agreement", "sampling", "training-speed", "emoji"]
    for part, minutes in ((1, 5), (2, 6), (3, 5)):
        assert sum(GPU_CHECKS[name] for name in GPU_PARTS[part]) <= 60 * minutes
    assert GPU_CHECKS["sharded"] >= 2 * 29  # two trainings


def checks(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setattr(gpu_report, "CHECKS", functions)


def contents(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))["checks"]


def test_numbers_are_written_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def rows(task: Task) -> dict[str, Any]:
        task.tell({"rows": [{"method": "one", "seconds": 1.5}]})
        seen.append(contents(tmp_path)["rows"])
        return {"rows": [{"method": "one", "seconds": 1.5}, {"method": "two", "seconds": None}]}

    def broken(task: Task) -> dict[str, Any]:
        task.tell({"before": 1.0})
        require(False, {"why": "so"})
        return {}

    checks(monkeypatch, rows=rows, broken=broken)
    assert not run_checks(tmp_path, {"broken": 10, "rows": 10}, 1, Task("cpu", True, 0.0))
    assert seen[0]["state"] == "running" and seen[0]["results"]["rows"] == [{"method": "one", "seconds": 1.5}]
    found = contents(tmp_path)
    assert found["rows"]["state"] == "passed" and found["broken"]["results"] == {"before": 1.0}
    text = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert "| one | 1.5 |" in text and "| two | – |" in text and "outside its limits: {'why': 'so'}" in text
    assert run_checks(tmp_path, {"rows": 10}, 1, Task("cpu", True, 0.0))  # the other one stays in the report
    assert contents(tmp_path).keys() == {"broken", "rows"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_report_that_is_none_is_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / "gpu_check.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu_check\.json' is no report of earlier checks: move it away"):
        run_checks(tmp_path, {"cards": 10}, 1, Task("cpu", True, 0.0))
    assert (tmp_path / "gpu_check.json").read_text() == text


class InCycle:
    """Something large in a cycle, as models with graphs are."""

    def __init__(self) -> None:
        self.again = lambda: self


def test_nothing_of_a_check_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[InCycle]] = []

    def making(task: Task) -> dict[str, Any]:
        alive.append(weakref.ref(InCycle()))
        return {}

    checks(monkeypatch, making=making)
    gc.disable()
    try:
        assert run_checks(tmp_path, {"making": 10}, 1, Task("cpu", True, 0.0))
    finally:
        gc.enable()
    assert alive[0]() is None


def test_what_has_nothing_to_work_with_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runs, "TESTS", (tmp_path / "none",))
    assert run_checks(tmp_path, {"tests": 10}, 1, Task("cpu", True, 0.0))
    entry = contents(tmp_path)["tests"]
    assert entry["state"] == "left out" and entry["error"].endswith("run this in a clone")


def test_what_a_command_printed_before_its_time_was_up_is_kept() -> None:
    command = [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(60)"]
    with pytest.raises(TimeoutError, match="its time was up; stdout: so far"):
        gpu_runs.quietly(command, time.perf_counter() + 3)


def test_a_check_that_takes_too_long_leaves_the_next_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, deadlines = [100.0], {}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(name: str, seconds: float) -> Any:
        def check(task: Task) -> dict[str, Any]:
            deadlines[name] = task.deadline - now[0]
            now[0] += seconds
            return {}

        return check

    seconds = {"quick": 1, "slow": 40, "next": 30, "last": 1}
    checks(monkeypatch, **{name: taking(name, value) for name, value in seconds.items()})
    passed = run_checks(tmp_path, dict.fromkeys(seconds, 10.0), 1, Task("other", False, 0.0))
    assert deadlines == {"quick": 10.0, "slow": 19.0, "next": 10.0}
    assert not passed and contents(tmp_path)["last"]["state"] == "no time left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "samplng"], "'samplng' is none of agreement, sampling, "),
        (["--only", "sampling:soon"], "the seconds of sampling must be a number above 0, got 'soon'"),
        (["--only", "sampling", "--part", "1"], "--part and --only exclude each other"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--emoji", "none.zip"], "there is no file 'none.zip'"),
        (["--part", "2"], "no CUDA device here; --small runs the command itself on any machine"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available() and arguments[0] == "--part":
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert done.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_small_checks_of_sampling(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    task = Task("cpu", True, time.perf_counter(), told.append)
    results = check_sampling(task)
    assert [row["method"] for row in results["batch 1"]] == ["graphs"]  # the time was up then
    assert check_bfloat16(task)["residual_mean"] < 0.05
    row = check_profile(task)["deep, batch 1, graph"]
    assert len(row["timings_us"]) == 3 and row["operations"] > 30
    assert max(check_fast_steps(task).values()) < 1e-3
    assert len(told) == 3


def test_what_is_compared_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our best way and the published algorithm, which takes the most time, once and not for ever; then our other ways."""
    measured: list[tuple[int, str]] = []

    class Noted(Comparison):
        def prepare(self, name: str) -> Any:
            return None

        def measure(self, name: str) -> None:
            measured.append((self.batch, name))
            if name == "published":
                generate_as_published(self.model, self.z, *self.conditions, limit=-self.published_limit)

    monkeypatch.setattr(gpu_sampling, "Comparison", Noted)
    monkeypatch.setattr(gpu_sampling, "random_model", lambda *given, **_: random_model(*given, **SMALL))
    monkeypatch.setattr(gpu_sampling, "roofline", lambda *_: [])
    monkeypatch.setattr(Noted, "rows", lambda self: [])
    results = check_sampling(Task("cpu", False, time.perf_counter() + 1e4))
    assert measured[:4] == [(batch, name) for batch in (1, 16) for name in ("compiled auto", "published")]
    assert measured[4:8] == [(batch, name) for batch in (1, 16) for name in ("compiled", "graphs")]
    ways = ("compiled auto", "compiled", "graphs", "published", "sequential")
    assert [measured.count((1, name)) for name in ways] == [REPEATS, REPEATS, REPEATS, 1, 1]
    assert "token 0 of 64 in a block when its time was up" in results["published 16"]


def test_a_calibration_of_its_own(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    results = check_calibration(Task("cpu", True, time.perf_counter() + 60, told.append))
    assert [row["block"] for row in results["blocks 1"]] == [0, 1]
    assert {row["method"]: len(row["timings"]) for row in results["batch 1"]} == {"graphs": 1, "graphs auto": 1}


def test_a_screen_of_text_is_kept_as_it_is() -> None:
    report = {"device": "cpu", "torch": "2", "checks": {}}
    report["checks"]["profile"] = {"state": "passed", "seconds": 1.0, "results": {"table": "a  1\nb  2", "n": 3}}
    text = gpu_report.markdown(report)
    assert "- n: 3" in text and "```\na  1\nb  2\n```" in text and "- table" not in text


def test_the_counted_memory_of_cards_is_what_is_counted() -> None:
    shape = shape_of("starflow_imagenet256")
    base, each = TRAINING_GIB["layer"]
    counted = training_memory(shape.arguments, 16, 0, "bfloat16", "layer").peak / 2**30
    assert base + 16 * each == pytest.approx(counted, rel=0.01)


def test_batches_fit_the_card() -> None:
    assert training_batches(79.1) == (16, 24, 32)
    assert training_batches(139.7)[0] == 32
    for memory in (23.5, 47.4, 79.1, 139.7):
        first, *_ = training_batches(memory)
        assert 1 <= first <= largest_batch("none", memory) < 2 * first
    assert training_batches(12.0) == (1, 2)  # whose rows say that there is no memory
    rows = what_cards_can_do()
    assert [row["card, GB"] for row in rows] == [24, 48, 80, 141]
    for name in rows[0]:
        assert all(one[name] <= other[name] for one, other in pairwise(rows)), name


def test_short_trainings_have_no_limit_of_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit would lower the steps of a run that compiles first, so that its likelihood is another."""
    seen: list[Any] = []

    class Ran:
        def __init__(self, config: Any, *_: Any):
            seen.append(config)

        def run(self) -> dict[str, float]:
            return {"latent_nats_per_dim": 1.0}

    monkeypatch.setattr(gpu_runs, "flow_trainer", Ran)
    assert nats_after(7, str(tmp_path / "run"), ["--train.compile", "true"]) == 1.0
    (config,) = seen
    assert config.train.max_minutes is None and config.train.steps == 7 and config.train.compile
    assert RUN[0] == "--config"


def test_drawings_stand_for_emoji(tmp_path: Path) -> None:
    write_drawings(str(tmp_path / "drawings.zip"), 3)
    images = ImageFolder(DataConfig(source="folder", path=str(tmp_path / "drawings.zip"), validation_fraction=0.0))
    assert len(images) == 3 and " " in images[0]["caption"]
