"""What commands refuse before work is done, and what they say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tarflow.benchmarks.exactness import Exactness, exactness_table
from tarflow.benchmarks.random_models import shape_of
from tarflow.cli.fid_settings import MetricsConfig, RunConfig
from tarflow.cli.main import help_text, main
from tarflow.common.command import ending
from tarflow.common.files import keep_settings
from tarflow.common.statistics import mean_and_error
from tarflow.common.words import counted
from tarflow.data.config import DataConfig
from tarflow.evaluation.reports.files import last_of, read_curves, read_metrics
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import check_rank
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.experiments import noise_levels
from tarflow.experiments.emoji_pictures import write_emoji_pictures
from tarflow.experiments.family.settings import FlowComparison
from tarflow.experiments.settings import ExactFlowConfig, LevelComparisonConfig


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command says as it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "likelihood", "--pipeline", "emoji"],
        ["report", "--pipeline", "emoji"],
        ["reconstruct", "--pipeline", "emoji", "--out", "x"],
        ["compare-decoding", "--pipeline", "emoji", "--out", "x"],
        ["train-student", "--pipeline", "emoji"],
        ["cache-latents", "--output", "x"],
    ],
)
def test_pictures_are_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "of which pictures? give --data.source folder --data.path PATH" in refused(capsys, *command)


def test_a_configuration_may_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (("data: {source: folder, path: nowhere}", "nowhere"), ("split: train", "of which pictures?")):
        (tmp_path / "a.yaml").write_text(f"pipeline: emoji\n{text}\n")
        for config in (["--config", str(tmp_path / "a.yaml")], [f"--config={tmp_path / 'a.yaml'}"]):
            assert said in refused(capsys, "evaluate", "likelihood", *config)


def test_metrics_that_cannot_be() -> None:
    gen = GenerationConfig(pipeline="x", out="y", num=4)
    for make in (
        lambda **more: MetricsConfig(**more),
        lambda **more: SweepConfig(gen=gen, ref="z", **more),
        lambda **more: RunConfig(data="a", stats="b", gen=gen, **more),
    ):
        with pytest.raises(ValueError, match="metrics is an empty list: give some of frechet"):
            make(metrics=[])
        with pytest.raises(ValueError, match="the metric 'inception_score' is of the extractor 'inception', but the"):
            make(metrics=["inception_score"], extractor="dinov2")
    for one in (
        lambda gen: SweepConfig(gen=gen, ref="z"),
        lambda gen: RunConfig(data="a", stats="b", gen=gen),
    ):
        with pytest.raises(ValueError, match=r"gen\.num is 1, but the metrics need at least 2"):
            one(GenerationConfig(pipeline="x", out="y", num=1))
    with pytest.raises(ValueError, match="classes of drawings have no background: take match_all"):
        check_rank("match_background", "class_prefix")
    check_rank("match_background", "prefix")


def test_a_whole_evaluation_draws_from_its_own_data() -> None:
    gen = GenerationConfig(pipeline="x", out="y", num=4)
    data = DataConfig(source="folder", path="p")
    assert RunConfig(data=data, split="validation", stats="b", gen=gen).gen.data == data
    assert RunConfig(data=data, split="validation", stats="b", gen=gen).gen.split == "validation"
    assert RunConfig(data="p", stats="b", gen=gen).gen.data is None
    own = GenerationConfig(pipeline="x", out="y", num=4, data=DataConfig())
    assert RunConfig(data=data, stats="b", gen=own).gen.data == DataConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 10**14}, "seed must be from 0 to 4,294,967,295, got 100000000000000"),
        ({"temperature": float("inf")}, "temperature must be positive, got inf"),
        ({"guidance_scale": float("inf")}, r"guidance_scale must be at least 1 \(off\), got inf"),
    ],
)
def test_numbers_of_samples(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(pipeline="x", out="y", num=4, **settings)


def test_settings_of_other_tools() -> None:
    for name, value in (("steps", 7), ("step_size", 0.5)):
        with pytest.raises(ValueError, match=f"{name} is for the tool 'inpaint', and has no effect with 'vary'"):
            ExactFlowConfig(pipeline="x", tool="vary", out="y.png", **{name: value})
        ExactFlowConfig(pipeline="x", tool="inpaint", out="y.png", **{name: value})
    levels = LevelComparisonConfig(out="x", ref="y", extractor="dinov2")
    assert noise_levels.sweep_of(levels, Path("x"), "fixed").extractor == "dinov2"


class TestKept:
    def test_a_comparison_of_flows_of_another_length(self, tmp_path: Path) -> None:
        keep_settings(tmp_path / "settings.json", {"quick": False, "seed": 0}, "a comparison")
        with pytest.raises(ValueError, match="has a comparison with quick False, not True: give another folder"):
            keep_settings(tmp_path / "settings.json", {"quick": True, "seed": 0}, "a comparison")
        with pytest.raises(ValueError, match="parts is empty: give some of plane"):
            FlowComparison(parts=())

    def test_a_file_that_is_no_json_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "settings.json").write_text("{")
        with pytest.raises(ValueError, match=r"settings\.json' is no JSON file .*: remove it, or give another folder"):
            keep_settings(tmp_path / "settings.json", {}, "a comparison")

    def test_pictures_of_equal_names(self, tmp_path: Path) -> None:
        for name, style in (("a", "noto"), ("b", "twemoji"), ("none", "openmoji")):
            (tmp_path / name).mkdir()
            line = {"file_name": "1f600.png", "text": name, "style": style}
            (tmp_path / name / "metadata.jsonl").write_text(json.dumps(line))
        folders = [str(tmp_path / name) for name in ("a", "b", "none")]
        with pytest.raises(ValueError, match=r"'1f600\.png' of '.*b' and '1f600\.png' of '.*a' would be one file"):
            write_emoji_pictures(folders[:2], tmp_path / "out", 1)
        with pytest.raises(ValueError, match=r"no row is left of '.*none': OpenMoji's are left out"):
            write_emoji_pictures(folders[2:], tmp_path / "out", 1)
        assert not (tmp_path / "out").exists()

    def test_ctrl_c_waits_for_a_trainings_checkpoint(self, tmp_path: Path) -> None:
        slow = tmp_path / "slow"
        slow.write_text(
            f"#!{sys.executable}\n"
            + textwrap.dedent(f"""
                import pathlib, signal, time
                stop = []
                signal.signal(signal.SIGINT, lambda *_: stop.append(1))
                pathlib.Path({str(tmp_path / "ready")!r}).touch()
                while not stop:
                    time.sleep(0.05)
                time.sleep(1)
                pathlib.Path({str(tmp_path / "saved")!r}).touch()
            """)
        )
        slow.chmod(0o755)
        code = f"import sys; from tarflow.experiments import noise_levels; sys.executable = {str(slow)!r}; noise_levels.train([])"
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
        for _ in range(3000):
            if (tmp_path / "ready").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert (tmp_path / "ready").exists()
        signal_group(process)
        assert process.wait(60) != 0
        assert (tmp_path / "saved").exists()

    def test_it_fails_with_the_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(noise_levels.subprocess, "Popen", lambda _: SimpleNamespace(wait=lambda: 2))
        with pytest.raises(ValueError, match="the training failed: tarflow train x"):
            noise_levels.train(["x"])


def signal_group(process: subprocess.Popen[Any]) -> None:
    """Ctrl-C, as a terminal sends it: to all processes of the group."""
    os.killpg(process.pid, signal.SIGINT)


class TestReports:
    def test_curves_of_two_runs_in_one_folder(self) -> None:
        def events(*steps: int) -> list[Any]:
            return [SimpleNamespace(step=step, value=float(100 * number + step)) for number, step in enumerate(steps)]

        assert last_of(events(0, 1, 2, 3)) == {0: 0.0, 1: 101.0, 2: 202.0, 3: 303.0}
        assert list(last_of(events(0, 1, 2, 3, 0, 1)).values()) == [400.0, 501.0]
        assert list(last_of(events(0, 5, 10, 5, 7))) == [0, 5, 7]

    def test_bits_are_no_nats(self, tmp_path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(tmp_path))
        for tag, value in (
            ("train/nats_per_dim", 1.0),
            ("held_out/pixel_nats_per_dim", 1.1),
            ("held_out/bits_per_dim", 3.0),
        ):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=1, summary=summary, wall_time=time.time()))
        writer.close()
        found = {title: set(series) for title, series in read_curves(str(tmp_path)).items()}
        assert found == {
            "likelihood, nats per dimension": {"train/nats_per_dim", "held_out/pixel_nats_per_dim"},
            "likelihood, bits per dimension": {"held_out/bits_per_dim"},
        }

    def test_numbers_that_are_not_finite(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.json").write_text(json.dumps({"metrics": {"fid": None, "kid": 0.5}}))
        assert read_metrics(str(tmp_path / "metrics.json")) == ({"kid": "0.5"}, [])

    def test_pipelines_of_one_folder_name(self) -> None:
        rows = [Exactness(f"{name}/pipeline", 1.0, "auto", value, value) for name, value in (("a", 1e-3), ("b", 0.5))]
        assert "a/pipeline" in exactness_table(rows) and "5.0e-01" in exactness_table(rows)


class TestWords:
    def test_of_one(self) -> None:
        assert [counted(1, "picture"), counted(1024, "draw")] == ["1 picture", "1,024 draws"]
        mean, error = mean_and_error(torch.tensor([2.0]))
        assert mean == 2 and math.isnan(error)

    def test_columns_of_the_help_stand_below_each_other(self) -> None:
        lines = [line for line in help_text().splitlines() if line.startswith("  compare-")]
        assert len(lines) > 3
        assert len({len(line) - len(line[2:].split(" ", 1)[1].lstrip()) for line in lines}) == 1

    def test_nobody_reads_on(self) -> None:
        script = "from tarflow.cli.main import main; main(['configs'])"
        command = f'{sys.executable} -c "{script}" | true; echo ${{PIPESTATUS[0]}}'
        found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert "error" not in found.stderr
        with pytest.raises(SystemExit) as stopped, ending():
            raise OSError(2, "not there", "file")
        assert stopped.value.code == 2

    def test_benchmarks_are_of_flows(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValueError, match=r"benchmarks are of flows, but .* has flow\.kind 'trajectory'"):
            shape_of("quickstart_trajectory")
        for option, value, message in (
            ("--guidance-scale", "0.5", r"--guidance-scale must be at least 1 (off), got 0.5"),
            ("--repeats", "0", "--repeats must be at least 1, got 0"),
        ):
            assert message in refused(capsys, "benchmark", "sampling", "--model", "x", option, value)
        assert "--peak-tflops must be positive, got -5.0" in refused(
            capsys, "benchmark", "training", "--model", "x", "--peak-tflops", "-5"
        )
