"""The command that shows what an exact flow can do, on a tiny pipeline with random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import make_pipeline

from tarflow.cli.exact_flow import main
from tarflow.experiments.decoding import labelled_rows

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of captions that draws 32 × 32 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("captions") / "pipeline"
    make_pipeline("prefix").save_pretrained(path)
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the script for a tool on three drawings; it writes ``out.png`` and what it prints is returned."""

    def call(tool: str, *options: str, pipeline: Path = folder) -> str:
        own = ["--tool", tool, "--pipeline", str(pipeline), "--out", str(tmp_path / "out.png")]
        main([*own, "--data.image_size", "32", "--num", "3", *options])
        return capsys.readouterr().out

    return call


def picture_size(rows: int, columns: int) -> tuple[int, int]:
    """Of a picture with so many rows of so many columns, as the script writes them."""
    images = torch.zeros(columns, 3, 32, 32, dtype=torch.uint8)
    return labelled_rows({f"row {row}": images for row in range(rows)}, least=64).size


def test_encode_writes_pictures_noise_and_pictures_again(run: Run, tmp_path: Path) -> None:
    text = run("encode")
    assert float(re.search(r"z → latents: (\S+);", text)[1]) < 1e-4
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == picture_size(3, 3)[1]


def test_inpainting_changes_no_known_pixel(run: Run, tmp_path: Path) -> None:
    text = run("inpaint", "--steps", "2")
    assert "fill: log p" in text and "metropolis: log p" in text
    assert text.count(", 0 known pixels changed") == 2
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == picture_size(4, 3)[1]


@pytest.mark.parametrize(("tool", "rows"), [("likelihood", 2), ("vary", 6), ("swap", 3), ("temperature", 5)])
def test_other_tools_write_their_rows(run: Run, tmp_path: Path, tool: str, rows: int) -> None:
    run(tool)
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == picture_size(rows, 3)[1]


def test_without_autoregressive_blocks_the_likelihood_has_no_map(run: Run, tmp_path: Path) -> None:
    make_pipeline("none", block="coupling").save_pretrained(tmp_path / "coupling")
    text = run("likelihood", pipeline=tmp_path / "coupling")
    assert "nats per dimension with none" in text and "not autoregressive" in text
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == picture_size(1, 3)[1]


def test_strangers_get_a_curve(run: Run, tmp_path: Path) -> None:
    text = run("ood", "--outside.source", "drawings", "--outside.image_size", "32")
    # The same pictures on both sides: no score tells them apart.
    assert text.count("AUC 0.5000 (3 inside, 3 outside") == 2
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 200


def test_bad_input_is_one_sentence(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("ood")
    assert "needs pictures of another kind: give --outside.source" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("encode", "--num", "1")
    assert "num must be at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("encode", pipeline=tmp_path / "nothing")
    assert "there is no pipeline" in capsys.readouterr().err
    make_pipeline("none").save_pretrained(tmp_path / "unconditional")
    with pytest.raises(SystemExit):
        run("swap", pipeline=tmp_path / "unconditional")
    assert "has no conditions to swap" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
