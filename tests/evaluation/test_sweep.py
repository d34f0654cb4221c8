"""Sweeps: every combination once, resumed without work done twice, the best row marked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import with_decoder
from fid_helpers import Means
from PIL import Image
from pipelines import make_pipeline
from students import small_student

from tarflow.cli.sweep import main as command
from tarflow.evaluation.features import extractors
from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.reports import sweep
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import run_sweep
from tarflow.evaluation.reports.sweep_tables import best_row, row_name
from tarflow.evaluation.samples.settings import GenerationConfig


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sweep") / "pipeline"
    make_pipeline("class_prefix").save_pretrained(folder)
    return str(folder)


def config_of(pipeline: str, out: Path, **options: Any) -> SweepConfig:
    gen = GenerationConfig(pipeline=pipeline, out=str(out), num=3, batch_size=3)
    lists = {"guidance_scale": [1.0, 2.0], "denoise": [True, False], "noise_std": [0.2, 0.3], "match": True}
    return SweepConfig(gen=gen, **{**lists, **options})


class Measure:
    """A metric that is best at guidance 2 and σ 0.3, and knows how often it was asked."""

    def __init__(self, fails_at: int | None = None):
        self.folders: list[str] = []
        self.fails_at = fails_at

    def __call__(self, folder: Path) -> dict[str, float]:
        if len(self.folders) == self.fails_at:
            raise RuntimeError("stopped")
        assert len(list(folder.rglob("*.png"))) == 3
        self.folders.append(folder.name)
        distance = 1.0 + ("guidance-1" in folder.name) + ("sigma-0.3" not in folder.name)
        return {"fid": distance, "precision": 1 / distance, "kid": 0.1, "kid_std": 0.01}


NAMES = [
    *("guidance-1_score_sigma-0.2_sequential", "guidance-1_score_sigma-0.3_sequential", "guidance-1_raw_sequential"),
    *("guidance-2_score_sigma-0.2_sequential", "guidance-2_score_sigma-0.3_sequential", "guidance-2_raw_sequential"),
]


def test_rows_tables_and_plots(pipeline, tmp_path) -> None:
    measure = Measure()
    rows = run_sweep(config_of(pipeline, tmp_path), measure)
    assert measure.folders == [row_name(row["settings"]) for row in rows] == NAMES
    assert all(row["images_per_second"] > 0 for row in rows)
    table = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["best"] for row in table] == ["", "", "", "", "best", ""]
    assert (table[4]["guidance_scale"], table[4]["noise_std"], table[4]["fid"]) == ("2.0", "0.3", "1.0")
    assert (table[2]["denoise"], table[2]["noise_std"]) == ("False", "")
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert [i for i, line in enumerate(lines) if line.startswith("| **")] == [6]
    assert lines[-1] == "Bold: the best by fid (less is better)."
    for name in ("guidance.png", "speed.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert pixels.std() > 5
    samples = {(tmp_path / "images" / name / "00000" / "00000000.png").read_bytes() for name in NAMES}
    assert len(samples) == 6


def test_resumed_without_doing_anything_twice(pipeline, tmp_path, monkeypatch) -> None:
    config = config_of(pipeline, tmp_path, keep_images=False)
    with pytest.raises(RuntimeError, match="stopped"):
        run_sweep(config, Measure(fails_at=4))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
    assert len(list(csv.DictReader((tmp_path / "sweep.csv").open()))) == 4
    assert (tmp_path / "guidance.png").is_file() and (tmp_path / "speed.png").is_file()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [NAMES[4]]  # drawn, but not measured
    generated, generate = [], sweep.generate_images

    def counting(gen: GenerationConfig, *arguments: Any) -> dict[str, Any]:
        result = generate(gen, *arguments)
        generated.append((Path(gen.out).name, result["generated"]))
        return result

    monkeypatch.setattr(sweep, "generate_images", counting)
    measure = Measure()
    rows = run_sweep(config, measure)
    assert measure.folders == NAMES[4:]
    assert generated == [(NAMES[4], 0), (NAMES[5], 3)]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert list((tmp_path / "images").iterdir()) == []
    assert len(run_sweep(config, measure)) == 6
    assert len(generated) == 2
    more = config_of(pipeline, tmp_path, guidance_scale=[1.0, 1.5, 2.0], noise_std=[0.2])
    assert len(run_sweep(more, measure)) == 8
    assert len(generated) == 4


def test_other_sweeps_are_refused(pipeline, tmp_path) -> None:
    options = {"guidance_scale": [1.0], "denoise": [False], "noise_std": None}
    run_sweep(config_of(pipeline, tmp_path, **options), Measure())
    with pytest.raises(ValueError, match=r"holds another sweep: metrics was \['frechet'\]"):
        run_sweep(config_of(pipeline, tmp_path, **options, metrics=["kernel"]), Measure())


def test_the_pipelines_own_values_are_no_other_rows(pipeline, tmp_path) -> None:
    config = config_of(pipeline, tmp_path, guidance_scale=None, denoise=None, noise_std=None)
    (row,) = run_sweep(config, Measure())
    wanted = {"guidance_scale": 1.0, "denoise": True, "decoder": "vae", "noise_std": 0.3, "decoding": "sequential"}
    wanted |= {"num_inference_steps": None, "temperature": 1.0}  # a flow of one level has one step
    assert row["settings"] == wanted
    measure = Measure()
    assert len(run_sweep(config_of(pipeline, tmp_path, guidance_scale=[1.0], denoise=None), measure)) == 2
    assert measure.folders == [NAMES[0]]


def test_two_names_of_the_score_step_are_one_row(pipeline, tmp_path) -> None:
    config = config_of(pipeline, tmp_path, denoise=["score", True, "learned"], guidance_scale=[1.0], noise_std=[0.2])
    assert [row["denoise"] for row in config.combinations()] == [True, "learned"]


def test_decoders_are_rows(tmp_path) -> None:
    with_decoder(make_pipeline("class_prefix"), default="vae").save_pretrained(tmp_path / "pipeline")
    options = {"guidance_scale": [1.0], "noise_std": [0.2, 0.3], "decoder": ["vae", "finetuned"]}
    config = config_of(str(tmp_path / "pipeline"), tmp_path / "out", denoise=None, **options)
    rows = run_sweep(config, Measure())
    assert [row_name(row["settings"]) for row in rows] == [*NAMES[:2], "guidance-1_finetuned_sequential"]
    record = json.loads((tmp_path / "out" / "images" / NAMES[0] / "generation.json").read_text())["settings"]
    assert (record["denoise"], record["decoder"]) == (True, "vae")
    both = config_of("x", tmp_path, denoise=[True, False], **options)
    assert [row["denoise"] for row in both.combinations() if row["decoder"] == "finetuned"] == [False, False]
    with pytest.raises(ValueError, match="no row is left: the finetuned decoder takes noisy latents"):
        config_of("x", tmp_path, denoise=[True], decoder=["finetuned"])


def test_students_are_rows_where_they_can_draw(tmp_path) -> None:
    pipe = make_pipeline("class_prefix")
    pipe.register_modules(student=small_student(pipe.flow))
    pipe.save_pretrained(tmp_path / "pipe")
    options = {"noise_std": None, "decoding": ["sequential", "student"]}
    rows = run_sweep(config_of(str(tmp_path / "pipe"), tmp_path / "a", guidance_scale=[2.0], **options), Measure())
    assert [(row["settings"]["decoding"], row["settings"]["denoise"]) for row in rows] == [
        *(("sequential", True), ("sequential", False), ("student", False))
    ]
    measure = Measure()
    with pytest.raises(ValueError, match="guidance_scale is 4, but this student was trained with guidance scales"):
        run_sweep(config_of(str(tmp_path / "pipe"), tmp_path / "b", guidance_scale=[1.0, 4.0], **options), measure)
    assert measure.folders == []
    only = {**options, "decoding": ["student"], "denoise": [True]}
    with pytest.raises(ValueError, match=r"no row is left: .* so give denoise \[false\] too"):
        run_sweep(config_of(str(tmp_path / "pipe"), tmp_path / "c", **only), measure)


def test_rows_of_earlier_versions_stay(pipeline, tmp_path) -> None:
    config = config_of(pipeline, tmp_path, guidance_scale=[1.0], noise_std=None)
    assert len(run_sweep(config, Measure())) == 2
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        del row["settings"]["decoder"], row["settings"]["temperature"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(run_sweep(config, Measure(fails_at=0))) == 2


def test_distances_to_a_reference(pipeline, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "real").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{i}.png")
    monkeypatch.setattr(extractors, "load_extractor", lambda *_: Extractor("means", Means(), "none", "none"))
    options = {"ref": str(tmp_path / "real"), "extractor": "means", "match": False, "noise_std": None}
    rows = run_sweep(config_of(pipeline, tmp_path / "out", guidance_scale=[1.0], **options))
    assert [list(row["metrics"]) for row in rows] == [["frechet_distance"]] * 2
    assert capsys.readouterr().out.count("warning: samples: 3 pictures are too few for 3 features") == 1
    assert (tmp_path / "out" / "reference" / "moments.safetensors").is_file()


def test_the_best_row() -> None:
    rows = [{"metrics": {"fid": fid, "match_shape": 0.5, "match_all": share}} for fid, share in ((3, 1), (2, 0))]
    assert best_row(rows) == 1
    assert best_row(rows, "match_all") == 0
    shares = [{"metrics": {"match_shape": shape, "match_all": every}} for shape, every in ((1.0, 0.1), (0.9, 0.2))]
    assert best_row(shares) == 1
    assert best_row([{"metrics": {"fid": float("nan")}}, {"metrics": {"fid": 3.0}}]) == 1
    assert best_row([{"metrics": {"fid": float("nan")}}]) is None
    with pytest.raises(ValueError, match="rank is 'x', but the metrics are fid, match_shape, match_all"):
        best_row(rows, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": []}, "guidance_scale is an empty list"),
        ({"guidance_scale": [0.5]}, r"guidance_scale must be at least 1"),
        ({"noise_std": [-1.0]}, "noise_std must be 0 or positive"),
        ({"match": False}, "nothing is measured: give ref"),
        ({"rank": "fid"}, "rank is 'fid', but the metrics are match_shape, match_colour, match_background, match_all"),
        ({"ref": "x", "rank": "kid", "match": False}, "rank is 'kid', but the metrics are fid"),
    ],
)
def test_bad_input(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        config_of("x", tmp_path, **options)


def test_the_script_reads_lists(pipeline, tmp_path, monkeypatch, capsys) -> None:
    wanted = []

    def fake(config: SweepConfig, *_: Any) -> None:
        wanted.append(config)
        (tmp_path / "sweep.md").write_text("the table")

    monkeypatch.setattr("tarflow.evaluation.reports.sweep.run_sweep", fake)
    arguments = ["--gen.pipeline", pipeline, "--gen.out", str(tmp_path), "--match", "true"]
    command([*arguments, "--guidance_scale", "[1, 2.5]", "--denoise", "[true, learned]"])
    assert wanted[0].guidance_scale == [1, 2.5]
    assert wanted[0].denoise == [True, "learned"]
    assert "the table" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command([*arguments, "--guidance_scale", "[0]"])
    assert "guidance_scale must be at least 1" in capsys.readouterr().err
