"""`tarflow evaluate fid`, which is also `evaluate_fid.py`, from end to end, with a random network instead of Inception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fid_helpers import save_backbone, save_clip, write_pictures
from helpers import ROOT

from tarflow.cli.fid import RunConfig, main
from tarflow.common.arguments import parse_dataclass
from tarflow.data.drawings import Drawings


class TestCommands:
    def test_ref_and_calc(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        weights = str(save_backbone(tmp_path / "x.safetensors"))
        write_pictures(tmp_path / "real")
        write_pictures(tmp_path / "drawn", seed=1)
        extractor = ["--extractor", "squeezenet1_1", "--extractor-weights", weights]
        stats, samples = str(tmp_path / "stats"), str(tmp_path / "drawn")
        ref = ["ref", "--data", str(tmp_path / "real"), "--out", stats, *extractor]
        main(ref)
        assert "computed" in capsys.readouterr().out
        main(ref)
        assert "already there" in capsys.readouterr().out
        main(["calc", "--ref", stats, "--samples", samples, *extractor])
        printed = capsys.readouterr().out
        assert "Fréchet distance (squeezenet1_1)" in printed
        assert "FID" not in printed and "KID" not in printed
        assert "warning: samples: 8 pictures are too few for 512 features" in printed
        assert "subsets of 8 pictures instead of 1000" in printed
        report = json.loads((tmp_path / "drawn/metrics.json").read_text())
        assert report["metrics"]["frechet_distance"] > 0
        assert (report["reference"]["count"], report["samples"]["size"]) == (8, [32, 32])
        assert report["settings"]["samples"] == samples
        assert {"metrics", "names", "extractor", "versions", "warnings"} < set(report)

        main(["calc", "--ref", str(tmp_path / "real"), "--samples", samples, "--out", f"{tmp_path}/2.json", *extractor])
        again = json.loads((tmp_path / "2.json").read_text())
        assert again["metrics"] == report["metrics"]

        (tmp_path / "drawn/generation.json").write_text('{"num": 9, "complete": true}')
        main(["calc", "--ref", stats, "--samples", samples, *extractor, "--metrics", "[frechet]"])
        assert "9 pictures were generated" in capsys.readouterr().out

        write_pictures(tmp_path / "real", seed=3)
        fails(ref, capsys, "holds statistics of other pictures")
        other = ["--extractor", "squeezenet1_1", "--extractor-weights", str(save_backbone(tmp_path / "y.safetensors"))]
        fails(["calc", "--ref", stats, "--samples", samples, *other], capsys, "their extractor's weights is")

    @pytest.mark.parametrize("kind", ["caption", "label"])
    def test_drawings_that_match(self, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
        """Seven of eight drawings are what was wanted."""
        drawings = Drawings(image_size=32)
        samples = tmp_path / "samples/00000"
        samples.mkdir(parents=True)
        rows = []
        for i in range(8):
            item = drawings[i]
            item["image"].save(samples / f"{i:08d}.png")
            rows.append({"index": i, kind: drawings[8][kind] if i == 3 else item[kind]})
        (tmp_path / "samples/conditions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        weights = str(save_backbone(tmp_path / "x.pth"))
        extractor = ["--extractor", "squeezenet1_1", "--extractor_weights", weights]
        data = ["--data.source", "drawings", "--data.image_size", "32", "--num", "8"]
        main(["ref", *data, *extractor, "--out", str(tmp_path / "stats")])
        calc = ["calc", "--ref", str(tmp_path / "stats"), "--samples", str(tmp_path / "samples"), "--match", "true"]
        if kind == "caption":
            calc += ["--clip", str(save_clip(tmp_path / "clip"))]
        main([*calc, *extractor, "--metrics", "[frechet]"])
        assert "matching samples, all" in capsys.readouterr().out
        metrics = json.loads((tmp_path / "samples/metrics.json").read_text())["metrics"]
        assert metrics["match_all"] == pytest.approx(7 / 8)
        assert metrics["frechet_distance"] == pytest.approx(0, abs=1e-4)
        assert ("clip_score" in metrics) == (kind == "caption")

    def test_errors_are_one_sentence(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        for argv, message in (
            ([], "expected a command of ref, gen, calc, run"),
            (["fid"], "expected a command"),
            (["ref", "--data", "x", "--out", "y", "--speed", "3"], "speed"),
            (["ref", "--data", "x", "--out", "y", "--num", "0"], "num must be at least 2, got 0"),
            (["calc", "--ref", "x", "--samples", "y", "--image_size", "0"], "image_size must be at least 1, got 0"),
            (["ref", "--data", "x", "--data.image_size", "3", "--out", "y"], "not both"),
            (
                ["ref", "--data", "x", "--out", "y", "--extractor", "vgg16", "--inception-weights", "z"],
                "inception_weights",
            ),
            (
                ["calc", "--ref", str(tmp_path), "--samples", str(tmp_path), "--extractor", "resnet18"],
                "needs its weights",
            ),
        ):
            fails(argv, capsys, message)

    def test_example_is_valid(self) -> None:
        config, _ = parse_dataclass(RunConfig, ["--config", str(ROOT / "configs/fid_example.yaml")])
        assert config.gen.data == config.data
        assert config.gen.num == config.num


def fails(argv: list[str], capsys: pytest.CaptureFixture, message: str) -> None:
    """The command exits with status 2 and one sentence."""
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and message in printed
