"""Calibration on machines that are busy, and what real calls correct of it; where it is kept."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_images, small_model
from pipelines import draw, make_pipeline
from torch import Tensor

from tarflow import TARFlowPipeline
from tarflow.common.cache import cache_folder
from tarflow.flows.decoding import calibration_store
from tarflow.flows.decoding.calibration import (
    COMPARISONS,
    TIMED_STEPS,
    TURNS,
    BlockChoice,
    calibrate,
    conditions_key,
    decodings,
)
from tarflow.flows.decoding.calibration_store import FILE_NAME, CalibrationStore, file_of, fingerprint
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.decoding.step import DecodeStep
from tarflow.flows.decoding.watch import DISTANCES, MOST_CALIBRATIONS, Calibration
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel


class Machine:
    """A clock that knows how long steps and sweeps take, and nothing else.

    Args:
        step, sweep: seconds of each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float, sweep: float):
        self.step, self.sweep, self.now, self.steps, self.sweeps = step, sweep, 0.0, 0, 0
        #: Seconds of the n-th step.
        self.step_takes: Callable[[int], float] = lambda count: self.step
        one_step, one_sweep = DecodeStep.__call__, InversionState.parameters

        def stepped(*arguments: Any) -> Any:
            self.steps += 1
            self.now += self.step_takes(self.steps)
            return one_step(*arguments)

        def swept(*arguments: Any) -> Any:
            self.sweeps += 1
            self.now += self.sweep
            return one_sweep(*arguments)

        monkeypatch.setattr(DecodeStep, "__call__", stepped)
        monkeypatch.setattr(InversionState, "parameters", swept)
        for module in ("calibration", "sampling"):
            monkeypatch.setattr(f"tarflow.flows.decoding.{module}.clock", lambda device: self.now)


def model_of_16_tokens() -> TARFlowModel:
    return small_model(sample_size=8)


def methods(choices: list[BlockChoice]) -> set[str]:
    return {choice.method for choice in choices}


def test_the_faster_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_16_tokens()
    z = random_images(model, 2)
    Machine(monkeypatch, step=1.0, sweep=1.0)
    choices = calibrate(model, z, None, None, None, 1e-4)
    assert methods(choices) == {"jacobi"}
    for choice in choices:
        assert (choice.step_ms, choice.sweep_ms, choice.sequential_ms) == (1e3, 1e3, 16e3)
        assert choice.best_ms == 1e3 * choice.sweeps < 9e3
    Machine(monkeypatch, step=1.0, sweep=5.0)
    choices = calibrate(model, z, None, None, None, 1e-4)
    assert methods(choices) == {"sequential"}
    assert all(choice.best_ms == choice.sequential_ms for choice in choices)


def test_a_block_that_converges_in_few_sweeps_is_drawn_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network with weak ties between its tokens and with strong ones, on a machine where a sweep takes 1.5
    steps: the first is drawn by its sweeps, the second token by token."""
    torch.manual_seed(0)
    model = small_model(sample_size=8, layers_per_block=(0, 1))
    z, block = random_images(model, 2), model.blocks[-1]
    machine = Machine(monkeypatch, step=1.0, sweep=1.5)
    (choice,) = calibrate(model, z, None, None, None, 1e-3)
    assert choice.method == "jacobi"
    assert choice.sweeps is not None
    assert choice.sweeps <= 8
    machine.sweeps = machine.steps = 0
    generate(model, z, decoding=decodings([choice], 1e-3))
    assert (machine.sweeps, machine.steps) == (choice.sweeps, 0)
    with torch.no_grad():
        block.proj_out.weight.mul_(40)
    (choice,) = calibrate(model, z, None, None, None, 1e-3)
    assert (choice.method, choice.sweeps) == ("sequential", None)


@pytest.mark.parametrize("busy", ["the first steps", "every second comparison"])
def test_a_disturbed_clock_chooses_nothing_slower(monkeypatch: pytest.MonkeyPatch, busy: str) -> None:
    """Steps look slow now and then, as if something else ran beside them."""
    machine = Machine(monkeypatch, step=1.0, sweep=5.0)
    first = TURNS * TIMED_STEPS

    def takes(count: int) -> float:
        place = (count - 1) % (first + 16 * COMPARISONS)
        if place < first:
            return 100.0
        return 100.0 if busy == "every second comparison" and (place - first) // 16 % 2 == 0 else 1.0

    machine.step_takes = takes
    model = small_model(sample_size=8, layers_per_block=(0, 1))
    assert methods(calibrate(model, random_images(model, 2), None, None, None, 1e-4)) == {"sequential"}


def test_sweeps_are_given_up_when_they_take_longer_than_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(sample_size=8, layers_per_block=(0, 1))
    machine = Machine(monkeypatch, step=1.0, sweep=5.0)  # three of them would do
    z = random_images(model, 2)
    calibrate(model, z, None, None, None, 1e-12)
    assert machine.sweeps <= TURNS + 3  # the third is over 0.9 · 16 s


@pytest.mark.parametrize(("limit", "chosen"), [(30.0, "sequential"), (1000.0, "jacobi")])
def test_a_calibration_has_a_limit_of_time(monkeypatch: pytest.MonkeyPatch, limit: float, chosen: str) -> None:
    """Sweeps would win, but probing took the time."""
    model = small_model(sample_size=8, layers_per_block=(0, 1))
    machine = Machine(monkeypatch, step=2.5, sweep=1.0)
    found = calibrate(model, random_images(model, 2), None, None, None, 1e-4, limit=limit)
    assert found[-1].method == chosen and (limit > 30 or machine.sweeps == TURNS)


def pipeline_on(monkeypatch: pytest.MonkeyPatch, step: float, sweep: float) -> tuple[TARFlowPipeline, Machine]:
    return make_pipeline("none"), Machine(monkeypatch, step, sweep)


def call(pipe: TARFlowPipeline) -> set[str]:
    """A call, and the methods that it used."""
    draw(pipe, num_images=2, output_type="latent", denoise=False)
    return {one.method for one in pipe.decodings}


def test_real_calls_correct_a_calibration_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that calibration saw of sequential decoding was slow, but not so that sweeps won by far; sweeps were not."""
    pipe, machine = pipeline_on(monkeypatch, step=2.5, sweep=5.0)
    assert call(pipe) == {"jacobi"}
    machine.step = 1.0
    used = [call(pipe) for _ in range(20)]
    assert used.index({"sequential"}) == DISTANCES[0] - 1
    assert all(one == {"sequential"} for one in used[DISTANCES[0] - 1 :])
    (choices,) = pipe.calibrations.values()
    assert all(choice.sequential_ms == choice.best_ms == 16e3 for choice in choices)


def test_real_calls_that_take_too_long_are_tried_sequentially(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, machine = pipeline_on(monkeypatch, step=1.0, sweep=2.0)
    used = [call(pipe) for _ in range(30)]
    assert used.count({"sequential"}) == 3  # after 2, 4 and 8 calls more
    assert used[-1] == {"jacobi"}
    machine.sweep = 8.0
    used = [call(pipe) for _ in range(8)]
    assert {"sequential"} in used[:3]
    assert used[-1] == {"sequential"}


def test_where_sweeps_win_clearly_only_slow_calls_lead_to_trials(tmp_path: Path) -> None:
    near = BlockChoice("jacobi", None, 1, 1, 4, 100, 60)
    calibration = Calibration([near], 1)
    for _ in range(DISTANCES[0]):
        assert not calibration.trial_is_due()
        calibration.record(["jacobi"], [60.0])
    assert calibration.trial_is_due()
    store = CalibrationStore(tmp_path / FILE_NAME, "model")
    store.put("here", Calibration([replace(near, best_ms=40)], 1))
    for _ in range(2 * DISTANCES[-1]):
        calibration = store.calibrations["here"]
        assert not calibration.trial_is_due() and calibration.settled
        store.watched("here", ["jacobi"])(0, 40.0)
    written = CalibrationStore(store.path, "model").calibrations["here"]
    assert written.calls == 0  # no file is written for each call
    store.watched("here", ["jacobi"])(0, 120.0)
    for one in (store, CalibrationStore(store.path, "model")):
        assert one.calibrations["here"].trial_is_due()
        assert {choice.method for choice in one.calibrations["here"].plan()} == {"sequential"}


def test_a_calibration_of_a_busy_machine_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, machine = pipeline_on(monkeypatch, step=10.0, sweep=50.0)  # sweeps suffer more than steps
    assert call(pipe) == {"sequential"}
    machine.step = machine.sweep = 1.0
    assert [call(pipe) for _ in range(2)] == [{"sequential"}, {"jacobi"}]
    (calibration,) = pipe.calibration_store().calibrations.values()
    assert calibration.calibrations == 2


def test_an_unsteady_machine_does_not_calibrate_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration([BlockChoice("sequential", None, 1, 9, None, 100, 100)], 1)
    while not calibration.stale:
        assert calibration.calibrations <= MOST_CALIBRATIONS
        calibration.record(["sequential"], [10.0])
        if not calibration.stale:
            break
        calibration = Calibration(calibration.choices, 1, calibration.calibrations + 1)
    assert calibration.calibrations == MOST_CALIBRATIONS


def test_calls_that_chose_themselves_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pipeline_on(monkeypatch, step=1.0, sweep=1.0)
    call(pipe)
    (calibration,) = pipe.calibration_store().calibrations.values()
    for _ in range(6):
        draw(pipe, num_images=2, decoding="sequential")
        draw(pipe, num_images=1, seeds=(1,), decoding="jacobi")
    assert (calibration.calls, calibration.trials) == (1, 0)


def test_what_calls_show_is_known_to_later_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes of one call each correct a choice too."""
    pipe, machine = pipeline_on(monkeypatch, step=2.5, sweep=5.0)
    pipe.save_pretrained(tmp_path / "pipeline")
    used = []
    for _ in range(5):
        pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        used.append(call(pipe))
        machine.step = 1.0
    assert used == [{"jacobi"}] * 2 + [{"sequential"}] * 3


class TestStore:
    def test_another_model_version_or_damage_is_measured_anew(self, tmp_path: Path, monkeypatch) -> None:
        model = model_of_16_tokens()
        choices = calibrate(model, random_images(model, 2), None, None, None, 1e-4)
        path = tmp_path / FILE_NAME
        store = CalibrationStore(path, fingerprint(model))
        store.put("here", Calibration(choices, 2, calls=1, least_ms=[1.0, 2.0]))
        assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]
        again = CalibrationStore(path, fingerprint(model))
        assert again.calibrations == store.calibrations and again.choices == {"here": choices}
        content = json.loads(path.read_text())
        for change in ({"format": 1}, {"torch": "1.0"}, {"model": "other"}):
            path.write_text(json.dumps({**content, **change}))
            assert CalibrationStore(path, fingerprint(model)).choices == {}
        content["calibrations"]["here"]["choices"][0]["method"] = "magic"
        earlier = {"model": content["model"], "calibrations": {"here": []}}
        for text in (json.dumps(content), json.dumps(earlier), "{", "[]"):
            path.write_text(text)
            assert CalibrationStore(path, content["model"]).choices == {}
        with torch.no_grad():
            model.blocks[0].proj_out.weight += 1
        assert fingerprint(model) != content["model"]

    def test_writers_at_the_same_time_keep_each_others(self, tmp_path: Path) -> None:
        path, choice = tmp_path / FILE_NAME, BlockChoice("sequential", None, 1, 1, None, 1, 1)
        stores = [CalibrationStore(path, "model") for _ in range(3)]  # each has read what there was: nothing

        def write(number: int) -> None:
            for i in range(10):
                stores[number].put(f"{number} {i}", Calibration([choice], 1))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(CalibrationStore(path, "model").choices) == 30
        assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]

    def test_places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TARFLOW_CACHE", str(tmp_path / "cache"))
        own, cached = tmp_path / "pipeline", tmp_path / "cache" / "calibrations"
        own.mkdir()
        assert file_of(None) is None and file_of("") is None
        assert file_of(own) == own / FILE_NAME
        names = {file_of(own, shared=True), file_of("someone/flow"), file_of("someone/other")}
        assert len(names) == 3 and {name.parent for name in names} == {cached}
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert file_of(own).parent == cached
        store = CalibrationStore(file_of(own), "model")
        store.put("here", Calibration([], 1))
        assert CalibrationStore(file_of(own), "model").choices == {"here": []}
        assert not list(own.iterdir())

    def test_no_place_at_all_is_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TARFLOW_CACHE", str(tmp_path / "file"))
        store = CalibrationStore(file_of("someone/flow"), "model")
        store.put("here", Calibration([], 1))
        assert store.choices == {"here": []}

    @pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
    def test_the_cache_is_where_the_system_has_it(self, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", system)
        for name in ("TARFLOW_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LOCALAPPDATA", "local")
        home = Path(os.path.expanduser("~"))
        places = {"linux": home / ".cache", "darwin": home / "Library/Caches", "win32": Path("local")}
        assert cache_folder().is_relative_to(places[system])
        monkeypatch.setenv("XDG_CACHE_HOME", "there")
        assert cache_folder() == Path("there/tarflow")

    def test_shipped_pipelines_stay_as_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TARFLOW_CACHE", str(tmp_path))
        pipe = TARFlowPipeline.from_pretrained("drawings_class")
        assert pipe.calibration_store().path.parent == tmp_path / "calibrations"

    def test_a_lock_that_nobody_gives_up_is_not_waited_for_long(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(calibration_store, "PATIENCE", 0.1)
        store = CalibrationStore(tmp_path / FILE_NAME, "model")
        with calibration_store.lock(store.path):
            store.put("here", Calibration([], 1))
        assert CalibrationStore(store.path, "model").choices == {"here": []}


def test_steps_and_blocks_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is watched is each block's own time, without what callbacks do between."""
    pipe, machine = pipeline_on(monkeypatch, step=1.0, sweep=9.0)

    def slow(pipeline: Any, index: int, step: int, tensors: dict[str, Tensor]) -> dict:
        machine.now += 1000.0
        return {}

    draw(pipe, num_images=2, callback_on_step_end=slow)
    (calibration,) = pipe.calibration_store().calibrations.values()
    assert calibration.least_ms == [16e3, 16e3]


def test_guidance_of_the_deep_block_alone_is_a_condition_of_its_own() -> None:
    model = small_model(conditioning="class_vectors")
    keys = [
        conditions_key(model, 2, (2, 2), guidance, 1e-3)
        for guidance in (None, Guidance(0.0, blocks="deep"), Guidance(1.0), Guidance(1.0, blocks="deep"))
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert "deep" not in keys[2]  # as earlier versions have it
