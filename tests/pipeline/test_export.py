"""Pipelines copied in 16 bits, as the shipped ones are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipelines import CAPTIONS, draw, make_pipeline
from safetensors.torch import load_file
from students import with_student

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.cli.export import main

WEIGHTS = Path("flow", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    flow = TARFlowModel(in_channels=3, sample_size=8, layers_per_block=[1, 1], width=32, head_dim=16)
    TARFlowPipeline(flow, noise_std=0.1).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_weights_take_half_and_cards_stay(pipeline: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    main(["--pipeline", str(pipeline), "--output", str(target)])
    (target / "README.md").write_text("a card")
    main(["--pipeline", str(pipeline), "--output", str(target)])
    assert (target / "README.md").read_text() == "a card"
    assert not [file for file in target.rglob("*.json") if "_name_or_path" in file.read_text()]
    stored = load_file(target / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = TARFlowPipeline.from_pretrained(target).flow
    assert loaded.dtype == torch.float32
    for name, value in load_file(pipeline / WEIGHTS).items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)


def test_text_encoders_and_students_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with_student(make_pipeline("prefix")).save_pretrained(tmp_path / "pipeline")
    main(["--pipeline", str(tmp_path / "pipeline"), "--output", str(tmp_path / "copy")])
    files = list((tmp_path / "copy").glob("*/*.safetensors"))
    assert {file.parent.name for file in files} == {"flow", "vae", "text_encoder", "student"}
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    pipes = [TARFlowPipeline.from_pretrained(tmp_path / name) for name in ("pipeline", "copy")]
    assert [module.dtype for module in (pipes[1].text_encoder, pipes[1].student)] == [torch.float32] * 2
    images = [draw(pipe, prompt=CAPTIONS[:2], decoding="student") for pipe in pipes]
    assert abs(images[0] - images[1]).max() < 0.05


def test_means_of_held_out_pictures_go_along(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "held_out.json").write_text('{"images": 3}')
    main(["--pipeline", str(pipeline), "--output", str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "held_out.json").read_text() == '{"images": 3}'


def test_a_learned_denoiser_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = TARFlowModel(sample_size=8, layers_per_block=[1], width=32, head_dim=16, learned_denoiser="unconditional")
    TARFlowPipeline(flow, noise_std=0.1).save_pretrained(tmp_path / "pipeline")
    paths = ["--pipeline", str(tmp_path / "pipeline"), "--output", str(tmp_path / "copy"), "--dtype", "float32"]
    main([*paths, "--without-denoiser"])
    whole, stored = (load_file(tmp_path / name / WEIGHTS) for name in ("pipeline", "copy"))
    assert {name for name in whole if name not in stored} == {name for name in whole if name.startswith("denoiser.")}
    assert all(torch.equal(value, whole[name]) for name, value in stored.items())
    copy = TARFlowPipeline.from_pretrained(tmp_path / "copy")
    assert copy.flow.denoiser is None
    with pytest.raises(ValueError, match="no learned denoiser"):
        copy.check_outputs("learned", "latent", None)


def test_what_cannot_be_copied(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other" / "vae").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["--pipeline", str(pipeline), "--output", str(tmp_path / "other")])
    assert "is there and no pipeline folder" in capsys.readouterr().err
    pipe = TARFlowPipeline.from_pretrained(pipeline)
    with torch.no_grad():
        next(pipe.flow.parameters()).fill_(1e5)
    pipe.save_pretrained(pipeline)
    with pytest.raises(SystemExit):
        main(["--pipeline", str(pipeline), "--output", str(tmp_path / "copy")])
    assert "has numbers that torch.float16 cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_means_of_a_pipeline_that_was_there_before_go(pipeline: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    main(["--pipeline", str(pipeline), "--output", str(target)])
    (target / "held_out.json").write_text('{"images": 3}')
    main(["--pipeline", str(pipeline), "--output", str(target)])
    assert not (target / "held_out.json").exists()


def test_examples_go_along_unless_there_are_some(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "examples.json").write_text('["a cat"]')
    for own, expected in ((None, '["a cat"]'), ('["a dog"]', '["a dog"]')):
        if own is not None:
            (tmp_path / "copy" / "examples.json").write_text(own)
        main(["--pipeline", str(pipeline), "--output", str(tmp_path / "copy")])
        assert (tmp_path / "copy" / "examples.json").read_text() == expected
