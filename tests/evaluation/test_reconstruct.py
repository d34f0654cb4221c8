"""The floor of distances: originals and reconstructions as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from pipelines import make_pipeline

from tarflow.cli.reconstruct import main


def test_originals_and_reconstructions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    size = str(pipe.flow.config.sample_size * pipe.codec.factor)
    options = ["--pipeline", str(tmp_path / "pipeline"), "--data.source", "drawings", "--data.image_size", size]
    main([*options, "--num", "5", "--batch_size", "2", "--out", str(tmp_path / "floor")])
    assert "5 pictures and their reconstructions" in capsys.readouterr().out
    for name in ("original", "reconstructed"):
        files = sorted((tmp_path / "floor" / name).iterdir())
        assert [file.name for file in files] == [f"{i:08d}.png" for i in range(5)]
        assert Image.open(files[0]).size == (int(size), int(size))
    with pytest.raises(SystemExit):
        main([*options, "--num", "3", "--out", str(tmp_path / "floor")])
    assert "holds pictures already, which would be mixed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--num", "null", "--out", str(tmp_path / "other")])
    assert "the drawings have no end" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--num", "0", "--out", str(tmp_path / "floor")])
    assert "num must be at least 1, got 0" in capsys.readouterr().err
