"""Results are not lost: places to write are tried before the work, and what is there is never told of as something else."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import CAPTIONS, make_pipeline

from tarflow.cli.main import main
from tarflow.data.config import DataConfig
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import run_sweep
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.experiments.family.runs import Runs


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a pipeline for captions, and one for classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines")
    make_pipeline("prefix").save_pretrained(folder / "captions")
    make_pipeline("class_prefix").save_pretrained(folder / "classes")
    return folder


def captioned(folder: Path, captions: list[str]) -> DataConfig:
    """Data of pictures with captions."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, caption in enumerate(captions):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source="folder", path=str(folder), image_size=32, validation_fraction=0)


class TestCaptionsThatChanged:
    """Images keep what they were drawn from, also where the settings are the same."""

    def config(self, pipelines: Path, out: Path, data: DataConfig, num: int) -> GenerationConfig:
        return GenerationConfig(
            pipeline=str(pipelines / "captions"), out=str(out), num=num, batch_size=2, captions="data", data=data
        )

    def test_of_the_data(self, pipelines: Path, tmp_path: Path) -> None:
        first, second = CAPTIONS[:2]
        data = captioned(tmp_path / "data", [first, second, first, second])
        out = tmp_path / "out"
        generate_images(self.config(pipelines, out, data, 2))
        generate_images(self.config(pipelines, out, data, 3))  # more of the same is welcome
        told = (out / "conditions.jsonl").read_bytes()
        captioned(tmp_path / "data", [first, "a blue star", first, second])
        for num in (3, 4):
            message = f"image 1 in .* was drawn from the caption {second!r}, which now is 'a blue star': take another"
            with pytest.raises(ValueError, match=message):
                generate_images(self.config(pipelines, out, data, num))
        assert (out / "conditions.jsonl").read_bytes() == told
        captioned(tmp_path / "data", [first, second, first, "a blue star"])  # of which no image was drawn yet
        generate_images(self.config(pipelines, out, data, 4))
        assert json.loads((out / "conditions.jsonl").read_text().splitlines()[3])["caption"] == "a blue star"

    def test_without_what_was_told(self, pipelines: Path, tmp_path: Path) -> None:
        data, out = captioned(tmp_path / "data", CAPTIONS[:2]), tmp_path / "out"
        generate_images(self.config(pipelines, out, data, 2))
        (out / "conditions.jsonl").unlink()
        with pytest.raises(
            ValueError, match=r"lacks conditions\.jsonl, so what its images were drawn from is not known"
        ):
            generate_images(self.config(pipelines, out, data, 2))
        classes = GenerationConfig(pipeline=str(pipelines / "classes"), out=str(tmp_path / "classes"), num=2)
        generate_images(classes)
        told = (tmp_path / "classes/conditions.jsonl").read_bytes()
        (tmp_path / "classes/conditions.jsonl").unlink()
        generate_images(classes)  # which its settings tell
        assert (tmp_path / "classes/conditions.jsonl").read_bytes() == told

    def test_between_rows_of_a_sweep(self, pipelines: Path, tmp_path: Path) -> None:
        data = captioned(tmp_path / "data", CAPTIONS[:2])
        gen = self.config(pipelines, tmp_path / "out", data, 2)

        def sweep(*scales: float) -> list[dict[str, Any]]:
            config = SweepConfig(gen=gen, guidance_scale=list(scales), match=True)
            return run_sweep(config, lambda folder: {"fid": 1.0})

        sweep(1.0)
        fixed = json.loads((tmp_path / "out/sweep.json").read_text())
        assert len(sweep(1.0, 1.5)) == 2
        captioned(tmp_path / "data", ["a blue star", CAPTIONS[1]])
        with pytest.raises(ValueError, match=r"holds another sweep: the captions or labels were others"):
            sweep(1.0, 2.0)
        del fixed["conditions"]  # as of earlier versions
        (tmp_path / "out/sweep.json").write_text(json.dumps(fixed))
        assert len(sweep(1.0, 2.0)) == 3


def test_interrupted_runs_do_not_mix_settings_and_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(value: int) -> Any:
        return lambda: ({"nats": float(value)}, {"x": torch.tensor(value)})

    runs = Runs(tmp_path)
    runs.get("run", {"steps": 1}, made(1))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tarflow.experiments.family.runs.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.get("run", {"steps": 2}, made(2))
    monkeypatch.undo()
    numbers, tensors = runs.get("run", {"steps": 1}, made(3))
    assert (numbers["nats"], int(tensors["x"])) in ((1.0, 1), (3.0, 3))


DRAWINGS = ["--data.source", "drawings", "--data.image_size", "32"]


def test_the_likelihood_is_printed_and_its_folder_made(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["evaluate", "likelihood", "--pipeline", str(pipelines / "captions"), *DRAWINGS, "--num_images", "2"]
    argv += ["--output", str(tmp_path / "new folder/ü.json")]
    main(argv)
    mean = json.loads((tmp_path / "new folder/ü.json").read_text())["mean"]
    assert f"{mean:.4f}" in capsys.readouterr().out

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x.json")

    monkeypatch.setattr("tarflow.cli.likelihood.write_json", full)
    with pytest.raises(SystemExit):
        main(argv)
    printed = capsys.readouterr()
    assert f"{mean:.4f}" in printed.out
    assert printed.err.endswith("error: No space left on device: 'x.json'\n")


def script(name: str, *argv: str) -> Any:
    """A call of a script."""

    def call() -> None:
        importlib.import_module(f"tarflow.scripts.{name}").main(list(argv))

    return call


def places(pipelines: Path, file: str) -> dict[str, Any]:
    """Commands that write a result at the end, told to write it below a file."""
    pipeline = str(pipelines / "captions")
    pipe, out = ["--pipeline", pipeline], ["--out", f"{file}/new"]
    generated = ["--gen.pipeline", pipeline, "--gen.out", f"{pipelines}/gen"]
    fid = ["--extractor", "squeezenet1_1", "--extractor_weights", "none"]
    return {
        "generate": lambda: main(["generate", "a", *pipe, "--out", f"{file}/x.png"]),
        "likelihood": lambda: main(["evaluate", "likelihood", *pipe, *DRAWINGS, "--output", f"{file}/x.json"]),
        "ref": lambda: main(["evaluate", "fid", "ref", *DRAWINGS, "--num", "4", *fid, *out]),
        "gen": lambda: main(["evaluate", "fid", "gen", *pipe, "--captions", "drawings", *out]),
        "calc": lambda: main(["evaluate", "fid", "calc", "--ref", pipeline, "--samples", pipeline, *fid, *out]),
        "cache": lambda: main(
            ["evaluate", "fid", "calc", "--ref", pipeline, "--samples", pipeline, *fid, "--cache_dir", f"{file}/new"]
        ),
        "run": lambda: main(
            ["evaluate", "fid", "run", *DRAWINGS, "--num", "4", *fid, "--stats", f"{pipelines}/stats", *generated, *out]
        ),
        "sweep": script("sweep", "--gen.pipeline", pipeline, "--gen.out", f"{file}/new", "--match", "true"),
        "report": script("report", *pipe, *DRAWINGS, "--out", f"{file}/x.html"),
        "reconstruct": script("reconstruct", *pipe, *DRAWINGS, *out),
        "compare_decoding": script("compare_decoding", *pipe, *DRAWINGS, "--extractor", "null", *out),
        "compare_student": script("compare_student", *pipe, *out),
        "compare_noise_levels": script("compare_noise_levels", "--match", "true", *out),
        "compare_peers": script("compare_peers", "--output", f"{file}/new"),
        "train_captions": script("train_captions", *DRAWINGS, "--vision", "none", "--output", f"{file}/new"),
        "captions": lambda: main(["evaluate", "captions", "--model", "none", "--samples", pipeline, *out]),
        "compare_flows": script("compare_flows", "--output", f"{file}/new"),
        "export_pipeline": script("export_pipeline", *pipe, "--output", f"{file}/new"),
        "benchmark": script("benchmark", "memory", "--output", f"{file}/new"),
        "gpu_check": script("gpu_check", "--small", "--output", f"{file}/new"),
        "exact_flow": script("exact_flow", "--tool", "encode", *pipe, "--out", f"{file}/x.png"),
    }


@pytest.mark.parametrize("command", places(Path(), ""))
def test_places_that_cannot_be_written_are_refused_before_the_work(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("tarflow.flows.model.TARFlowModel.__init__", work)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as done:
        places(pipelines, str(tmp_path / "file"))[command]()
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert error.startswith("error: ") and "is a file and no folder" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
