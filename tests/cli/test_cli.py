"""`tarflow`: what its commands write, and how they answer bad input."""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, fresh_process
from PIL import Image
from pipelines import make_pipeline
from trainings import CLASS_FLOW, SMALL

from tarflow import configs
from tarflow.cli import fid
from tarflow.cli.benchmark import parser
from tarflow.cli.configs import purpose
from tarflow.cli.main import COMMANDS, main
from tarflow.cli.models import first_sentence
from tarflow.cli.pictures import file_stems
from tarflow.pipeline.call import limits


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a pipeline for captions, one for classes, and one for neither, on pixels."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, conditioning in (("captions", "prefix"), ("classes", "class_prefix"), ("pixels", "none")):
        make_pipeline(conditioning, vae=name != "pixels").save_pretrained(folder / name)
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def generate(pipelines: Path, name: str, *arguments: str) -> None:
    main(["generate", "--pipeline", str(pipelines / name), *arguments])


class TestGenerate:
    def test_same_seed_same_bytes(self, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            generate(pipelines, "captions", "a red ring", "--seed", seed, "--out", f"{tmp_path}/new/{name}.png")
        files = {name: (tmp_path / f"new/{name}.png").read_bytes() for name in "abc"}
        assert files["a"] == files["b"] != files["c"]
        assert "a.png: 1 picture of 32 × 32 pixels, seed 1, " in capsys.readouterr().out
        assert len(list((tmp_path / "new").iterdir())) == 3  # nothing temporary stays

    def test_picture_i_is_the_same_for_any_number(self, pipelines: Path, tmp_path: Path) -> None:
        guided = ("a red ring", "--guidance", "2", "--seed", "3", "--out")
        generate(pipelines, "captions", *guided, f"{tmp_path}/several/", "--num", "3")
        generate(pipelines, "captions", *guided, f"{tmp_path}/one.png")
        several = [pixels(tmp_path / f"several/a-red-ring-s3-{i:04d}.png") for i in range(3)]
        assert np.abs(several[0] - pixels(tmp_path / "one.png")).max() <= 1
        assert np.abs(several[0] - several[1]).max() > 1

    def test_grid_has_a_row_for_each_class(self, pipelines: Path, tmp_path: Path) -> None:
        classes = ("--class", "Gas Pump", "--class", "1", "--num", "3", "--seed", "0", "--size", "16x24", "--out")
        generate(pipelines, "classes", *classes, f"{tmp_path}/grid.webp")
        generate(pipelines, "classes", *classes, str(tmp_path))  # a folder that exists
        assert Image.open(tmp_path / "grid.webp").size == (3 * 16, 2 * 24)
        assert len(list(tmp_path.glob("gas-pump-s0-*.png"))) == len(list(tmp_path.glob("1-s0-*.png"))) == 3

    def test_captions_of_one_file_name(self, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        out = ("--out", f"{tmp_path}/new folder/", "--seed", "1", "--num", "2")
        generate(pipelines, "captions", "a red ring", "a red ring 3", "a red ring", "𠀀" * 99, *out)
        assert "8 pictures" in capsys.readouterr().out
        assert len(list((tmp_path / "new folder").iterdir())) == 8

    def test_batches_without_conditions(self, pipelines: Path, tmp_path: Path) -> None:
        pipe_arguments = ("--num", "35", "--seed", "0", "--decode-with", "none", "--out", f"{tmp_path}/x.jpg")
        generate(pipelines, "pixels", *pipe_arguments)  # of 4 × 4 pixels, 32 at once
        assert Image.open(tmp_path / "x.jpg").size == (6 * 4, 6 * 4)


BAD = [
    ("captions", [""], "the caption is empty"),
    ("captions", ["a", "  "], "the caption is empty"),
    ("captions", [], "draws from captions: give one"),
    ("captions", ["--class", "1"], "has no classes"),
    ("captions", ["a", "--class", "1"], "either captions or --class"),
    ("captions", ["a", "--num", "-1"], "--num must be at least 1, got -1"),
    ("captions", ["a", "--num", "x"], "invalid int value: 'x'"),
    ("captions", ["a", "--num", "1000000000"], "1,000,000,000 pictures are too many"),
    ("captions", ["a", "--guidance", "0.5"], "--guidance-scale must be at least 1 (off), got 0.5"),
    ("captions", ["a", "--guidance", "nan"], "--guidance-scale must be at least 1 (off), got nan"),
    ("captions", ["a", "--negative-prompt", "b"], "needs --guidance-scale above 1"),
    ("captions", ["a", "--seed", "-3"], "--seed must be 0 to"),
    ("captions", ["a", "--size", "big"], "--size must be width x height"),
    ("captions", ["a", "--size", "30x32"], "width must be a positive multiple of 8, got 30"),
    ("captions", ["a", "--size", "800000x800000"], "not even one fits"),
    ("captions", ["a", "--decode-with", "finetuned"], "has no finetuned decoder"),
    ("captions", ["a", "--decode-with", "learned"], "has no learned denoiser"),
    ("captions", ["a", "--device", "abacus"], "cannot use the device 'abacus'"),
    ("captions", ["a", "--out", "x.gif"], "'x.gif' must end with .png, .jpg, .jpeg, .webp, or with /"),
    ("captions", ["a", "--out", f"{__file__}/x.png"], "is a file and no folder"),
    ("captions", ["a", "--out", ""], "the name of a file or folder to write is empty"),
    ("captions", ["a", "--nun", "3"], "unrecognized arguments: --nun 3"),
    ("classes", ["a"], "takes no captions: give --class, tench, church, gas pump (or 0 to 2)"),
    ("classes", [], "draws classes: give --class, tench"),
    ("classes", ["--class", "charch"], "unknown class 'charch'; did you mean 'church'?"),
    ("classes", ["--class", "3"], "unknown class '3'; the pipeline has tench"),
    ("pixels", ["--class", "1"], "has no classes"),
    ("missing", ["a"], "there is no pipeline"),
    ("", ["a"], "is no folder of a pipeline: it has no model_index.json"),
    ("broken", ["a"], "cannot open the pipeline"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_input_is_one_sentence(
    pipelines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    name: str,
    arguments: list[str],
    message: str,
) -> None:
    if name == "broken":
        (pipelines / name).mkdir(exist_ok=True)
        (pipelines / name / "model_index.json").write_text("{")
    out = [] if "--out" in arguments else ["--out", f"{tmp_path}/x.png"]
    refused(["generate", "--pipeline", str(pipelines / name), *out, *arguments], capsys, message)
    assert not list(tmp_path.iterdir())


def refused(argv: list[str], capsys: pytest.CaptureFixture, message: str) -> None:
    """The command ends with status 2 and one sentence on stderr."""
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.err.startswith("error: ") and message in printed.err


def test_mistyped_paths_are_not_looked_for_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("looked for on the Hub")

    monkeypatch.setattr("tarflow.pipeline.loading.hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    gen = ["evaluate", "fid", "gen", "--pipeline", "runs/pipelin", "--out", "samples"]
    refused(gen, capsys, "there is no pipeline 'runs/pipelin'")
    for name in ("pipeline", "./runs/pipelin", "/none/here", "runs/pipelin", "a/b/c"):
        refused(["generate", "a", "--pipeline", name, "--out", "x.png"], capsys, f"there is no pipeline {name!r}")
    refused(["generate", "a", "--pipeline", "owner/name", "--out", "x.png"], capsys, "looked for on the Hub")


def test_small_memory(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches shrink to what fits; a grid that does not is refused."""
    monkeypatch.setattr("tarflow.pipeline.call.limits.available_bytes", lambda device: 3_000_000)
    assert 0 < limits.largest_count(make_pipeline("prefix"), 8, guided=False) < 8
    generate(pipelines, "captions", "a", "--num", "8", "--seed", "0", "--out", f"{tmp_path}/x.png")
    assert Image.open(tmp_path / "x.png").size == (96, 96)
    monkeypatch.setattr("tarflow.cli.drawing.available_bytes", lambda device: 40_000)
    many = ["generate", "a", "--pipeline", str(pipelines / "captions"), "--num", "8", "--out", f"{tmp_path}/y.png"]
    refused(many, capsys, "a grid of 8 pictures takes")


@pytest.mark.parametrize(
    "command",
    ["", "generate", "train", "evaluate", "evaluate fid", "evaluate fid gen", "evaluate likelihood", "demo", "models"],
)
def test_help(command: str, capsys: pytest.CaptureFixture) -> None:
    try:
        main([*command.split(), "--help"])
    except SystemExit as done:
        assert not done.code
    printed = capsys.readouterr().out
    assert f"tarflow {command}".strip() in printed
    assert "\n  tarflow " in printed or "\n    tarflow " in printed  # an example on a line of its own
    if not command:
        main([])
        assert capsys.readouterr().out == printed


#: Commands of commands, which have the options.
STEPS = {
    "evaluate": ("likelihood", "captions", *(f"fid {step}" for step in fid.COMMANDS)),
    "benchmark": ("sampling", "exactness", "training", "memory", "data"),
}


@pytest.mark.parametrize(
    "command", [f"{command} {step}".strip() for command in COMMANDS for step in STEPS.get(command, ("",))]
)
def test_every_option_has_a_line_of_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of settings within settings, which an option like ``--data.mix.help`` tells."""
    shown: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser, *_: shown.append(parser))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    for option in shown[0]._option_string_actions:
        if option.endswith(".help"):
            with pytest.raises(SystemExit):
                main([*command.split(), option])
    actions = [action for parser in shown for action in parser._actions]
    assert not [action.option_strings or action.dest for action in actions if not (action.help or "").strip()]


@pytest.mark.parametrize("step", STEPS["benchmark"])
def test_every_benchmark_has_an_example(step: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", step, "--help"])
    (example,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  tarflow ")]
    command, *options = example.split()[1:]
    assert parser().parse_args(options).command == step and command == "benchmark"


@pytest.mark.parametrize("name", ["num_images", "draws", "batch_size"])
def test_counts_of_evaluations_are_at_least_one(name: str, capsys: pytest.CaptureFixture) -> None:
    argv = ["evaluate", "likelihood", "--pipeline", "none", "--data.source", "drawings", f"--{name}", "0"]
    refused(argv, capsys, f"{name} must be at least 1, got 0")


def test_unknown_commands_and_missing_configurations(capsys: pytest.CaptureFixture) -> None:
    refused(["genrate"], capsys, "unknown command 'genrate'; did you mean generate?")
    refused(["evaluate", "beauty"], capsys, "tarflow evaluate has fid, likelihood")
    refused(["train", "--config", "quickstart"], capsys, "quickstart_class, quickstart_text, ")
    refused(["train", "--config", "quickstart_text", "--train.stebs", "3"], capsys, "stebs")
    refused(["demo", "--pipeline", "emoji", "--port", "0"], capsys, "--port must be 1 to 65535")


def test_demo_without_gradio(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(["demo", "--pipeline", "emoji"], capsys, "pip install 'tarflow[demo]'")


def test_demo_serves_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr("tarflow.demo.page.serve", lambda *arguments: served.append(arguments))
    main(["demo", "--pipeline", "emoji", "--port", "8000", "--open"])
    assert served == [("emoji", "127.0.0.1", 8000, True, None)]


def test_train_then_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps from a shipped configuration by its bare name; then the likelihood of drawings."""
    fresh_process()
    monkeypatch.chdir(tmp_path)  # where there is no folder of configurations
    run = ["--config", "quickstart_class", *SMALL, "--flow", CLASS_FLOW, "--train.steps", "2", "--output", "run"]
    main(["train", *run])
    data = ["--data.source", "drawings", "--data.image_size", "32", "--num_images", "4", "--output", "likelihood.json"]
    capsys.readouterr()
    main(["evaluate", "likelihood", "--pipeline", "run/pipeline", *data])
    result = json.loads((tmp_path / "likelihood.json").read_text())
    assert f"nats per latent dimension           {result['mean']:.4f}" in capsys.readouterr().out
    refused(["evaluate", "likelihood", "--pipeline", "run", *data], capsys, "its pipeline is 'run/pipeline'")


def test_shipped_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    card = "---\nlicense: apache-2.0\n---\n# Fruit\n\n![grid](x.png)\n\nDraws fruit in 64 × 64\npixels. Trained on emoji.\n"
    (tmp_path / "fruit").mkdir()
    (tmp_path / "fruit/README.md").write_text(card)
    assert first_sentence(tmp_path / "fruit/README.md") == "Draws fruit in 64 × 64 pixels."
    monkeypatch.setattr("tarflow.cli.models.FOLDER", tmp_path)
    monkeypatch.setattr("tarflow.cli.models.shipped", lambda: ("fruit",))
    main(["models"])
    assert capsys.readouterr().out == "fruit  Draws fruit in 64 × 64 pixels.\n"


def test_file_names_differ() -> None:
    assert file_stems(["A red apple!", "a red apple", "絵", "…"]) == ["a-red-apple", "a-red-apple-2", "絵", "image"]
    assert len(file_stems(["x" * 500])[0]) == 60
    many = ["a red heart", "a red heart 3", "a red heart", "A RED HEART", "a red heart 2"]
    assert len(set(file_stems(many))) == 5
    assert all(len(stem.encode()) <= 180 for stem in file_stems(["絵" * 99, "𠀀" * 99, "é" * 99]))


def test_every_configuration_ships() -> None:
    assert set(configs.shipped()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert Path(configs.resolve("quickstart_text")).is_file()


def test_configurations_are_listed_with_what_they_are_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*configs.shipped(), *configs.launchers()]
    for line in lines:
        name, told = line.split(None, 1)
        assert 20 < len(told) < 260 and "tarflow " not in told.replace("`", ""), name
    main(["configs", "quickstart_text"])
    assert capsys.readouterr().out == f"{configs.FOLDER / 'quickstart_text.yaml'}\n"
    (tmp_path / "mine.yaml").write_text("# Draws fruit of\n# 8 pixels, start it so:\n#   tarflow train\noutput: x\n")
    assert purpose(tmp_path / "mine.yaml") == "Draws fruit of 8 pixels, start it so"
    (tmp_path / "mine.yaml").write_text("output: x\n# y\n")
    assert purpose(tmp_path / "mine.yaml") == ""


@pytest.mark.parametrize("script", ["train_latent", "evaluate_fid", "evaluate_bpd"])
def test_root_scripts_are_the_same_commands(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as done:
        assert not done.code
    assert f"{script}.py " in capsys.readouterr().out


def test_as_a_program(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "tarflow.cli"]
    done = subprocess.run([*run, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("tarflow 0.")
    done = subprocess.run([*run, "generate", "a"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == ("error: the following arguments are required: --out; see tarflow generate --help\n")
