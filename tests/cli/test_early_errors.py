"""What can be said of a command at once is said before the libraries are loaded, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tarflow.cli.main import COMMANDS, main
from tarflow.cli.parsing import dashed
from tarflow.common.arguments import underscored
from tarflow.pipeline.loading.place import default_pipeline, facts_of, locate

#: Commands with something wrong, and what is said of it.
WRONG = [
    ("generate --out x.png", "this pipeline draws from captions: give one"),
    ("generate a --pipeline nowhere --out x.png", "there is no pipeline 'nowhere'"),
    (
        "generate --class square --pipeline drawings_class --out x.png",
        "unknown class 'square'; did you mean 'red square', 'blue square' or 'green square'?",
    ),
    (
        "generate a --denoise score --decoder finetuned --out x.png",
        "--decoder finetuned removes the noise itself: leave",
    ),
    ("generate a --out x.gif", "must end with .png"),
    ("generate a --out x.png --gui 2", "unrecognized arguments: --gui"),
    (
        "generate a --out x.png --decode-with score --decoder vae",
        "give either --decode-with, or --denoise and --decoder",
    ),
    ("demo --pipeline nowhere", "there is no pipeline 'nowhere'"),
    ("exact-flow --tool encode --pipeline nowhere --out x.png", "there is no pipeline 'nowhere'"),
    ("exact-flow --tool encode --pipeline emoji --out x.jpg", "must be the name of a .png file"),
    ("train --config quickstart_txt", "there is no configuration 'quickstart_txt'"),
    ("train --config quickstart_text --data.wher x", "unknown option --data.wher; did you mean --data.where?"),
    (
        "train --config quickstart_text --data.source folder --data.path nowhere",
        "the data path 'nowhere' does not exist",
    ),
    ("train --config quickstart_text --data.source latents --data.path nowhere", "no latent cache in 'nowhere'"),
    ("train --config quickstart_text --data.source folder --data.path .", "no images found in '.': expected files"),
    ("cache-latents --output x --data.source folder --data.path /dev/null", "neither a folder nor a zip archive"),
    ("train --config quickstart_text --vae.name emoji", "a shipped pipeline, whose autoencoder is taef2"),
    ("cache-latents --output x --data.source drawings --vae.name nowhere", "owner/name): there is no such folder"),
    ("train --config quickstart_text --train.steps 0", "train.steps must be at least 1, got 0"),
    ("train-vae --config vae_emoji --sources.emoji.data.path nowhere", "the data path 'nowhere' does not exist"),
    ("train-student --config student_drawings --pipeline nowhere", "there is no pipeline 'nowhere'"),
    (
        "finetune-decoder --config decoder --pipeline emoji --data.path nowhere",
        "the data path 'nowhere' does not exist",
    ),
    ("train --config quickstart_text --data.path x", "data.source is 'drawings', which the project makes itself"),
    ("train --config quickstart_text --init_from nowhere", "there is no pipeline 'nowhere'"),
    ("train --config quickstart_text --text.kind pretrained --text.name /nowhere", "there is no folder '/nowhere'"),
    ("train --config quickstart_text --log.prompts []", "log.prompts is an empty list"),
    ("train --config quickstart_text --text.vocab_size 2", "text.vocab_size must be at least 4, got 2"),
    ("cache-latents --output x --data.source folder --data.path nowhere", "the data path 'nowhere' does not exist"),
    ("evaluate fid ref --data nowhere --out x", "the data path 'nowhere' does not exist"),
    ("evaluate fid gen --pipeline nowhere --out x", "there is no pipeline 'nowhere'"),
    ("evaluate fid calc --ref nowhere --samples x", "the data path 'nowhere' does not exist"),
    ("evaluate likelihood --pipeline emoji --data.source folder --data.path nowhere", "path 'nowhere' does not exist"),
    ("evaluate likelihood --pipeline emoji --data.source drawings --num_images null", "the drawings have no end"),
    ("evaluate captions --model x --samples nowhere", "the data path 'nowhere' does not exist"),
    ("sweep --gen.pipeline nowhere --gen.out x --match true", "there is no pipeline 'nowhere'"),
    ("report --pipeline nowhere", "there is no pipeline 'nowhere'"),
    ("reconstruct --pipeline nowhere --out x", "there is no pipeline 'nowhere'"),
    ("compare-decoding --pipeline nowhere --out x", "there is no pipeline 'nowhere'"),
    ("compare-student --pipeline nowhere --out x", "there is no pipeline 'nowhere'"),
    ("compare-noise-levels --train nothing --match true --out x", "there is no configuration 'nothing'"),
    ("compare-noise-levels --train pixels_levels --ref nowhere --out x", "the data path 'nowhere' does not exist"),
    ("compare-peers --train [flow] --output x", "train must list some of flow_muon"),
    ("compare-peers --data.source folder --data.path nowhere --output x", "the data path 'nowhere' does not exist"),
    (
        "train-captions --data.source folder --data.path nowhere --vision v --output x",
        "the data path 'nowhere' does not exist",
    ),
    ("compare-flows --parts [plain]", "a part must be one of"),
    ("benchmark sampling --pipeline nowhere", "there is no pipeline 'nowhere'"),
    ("benchmark memory --model nothing", "there is no configuration 'nothing'"),
    ("benchmark training --batches 0", "--batches must be at least 1"),
    ("convert --checkpoint nowhere --config x --output y", "--checkpoint: there is no file 'nowhere'"),
    ("gpu-check --minutes 0", "--minutes must be above 0"),
    ("sweep --gen.pipeline emoji --gen.out /dev/null/x --match true", "cannot write '/dev/null/x'"),
    ("evaluate fid gen --pipeline emoji --out /dev/null/x", "cannot write '/dev/null/x'"),
    ("check-reference nowhere", "there is no folder 'nowhere'"),
    ("export --pipeline nowhere --output x", "there is no pipeline 'nowhere'"),
]
#: Runs the commands that come on its input, a line each, and says after each whether torch has been loaded.
CODE = """
import contextlib, io, sys
from tarflow.cli.main import main
for line in sys.stdin:
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        try:
            main(line.split())
        except SystemExit as error:
            text.write(f" {error.code}")
    slow = [name for name in ("torch", "diffusers", "transformers", "accelerate") if name in sys.modules]
    print(" ".join(text.getvalue().split()), slow, sep=" | ", flush=True)
"""


def test_errors_come_before_libraries_are_loaded(tmp_path: Path) -> None:
    lines = "".join(f"{command}\n" for command, _ in WRONG)
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(run, input=lines, capture_output=True, text=True, cwd=tmp_path, check=True)
    answers = done.stdout.splitlines()
    assert len(answers) == len(WRONG)
    for (command, message), answer in zip(WRONG, answers, strict=True):
        text, _, slow = answer.rpartition(" | ")
        assert message in text and text.startswith("error: ") and text.endswith(" 2"), f"{command}: {answer}"
        assert slow == "[]", f"{command}: {answer}"
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_tried() -> None:
    tried = {command.split()[0] for command, _ in WRONG}
    assert tried >= set(COMMANDS) - {"models", "configs"}


def test_dashes_and_underscores_are_the_same() -> None:
    assert underscored(["--noise-std", "-1", "--data.where=a-b", "x-y"]) == [
        *("--noise_std", "-1", "--data.where=a-b", "x-y")
    ]
    own = ["--sources.my-set.data.image-size", "8", "--data.class-names.my-cat=Cat", "--data.where.skin-tone", "[a]"]
    assert underscored(own) == [
        *("--sources.my-set.data.image_size", "8", "--data.class_names.my-cat=Cat", "--data.where.skin-tone", "[a]")
    ]
    assert [dashed(text) for text in ("--guidance_scale=1_0", "a_b", "--out", "-x_y")] == [
        *("--guidance-scale=1_0", "a_b", "--out", "-x_y")
    ]


def test_what_files_say_of_a_pipeline(tmp_path: Path) -> None:
    facts = facts_of(locate("drawings_class"))
    assert facts is not None and facts.conditioning.startswith("class")
    assert facts.num_classes == len(facts.names) == 36
    assert facts_of(str(tmp_path)) is None
    assert facts_of("owner/name") is None
    assert default_pipeline() == "emoji"


def test_the_page_and_the_command_line_have_the_same_default(capsys: pytest.CaptureFixture) -> None:
    for command in ("generate", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "the shipped pipeline of emoji" in " ".join(capsys.readouterr().out.split())
