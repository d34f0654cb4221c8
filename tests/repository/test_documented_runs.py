"""Every command of README and docs, copied out of them, is run in a small form, or stands below with the reason why not.

To add a command to a document is enough: it is run here with the smaller numbers of `SMALL`, in a folder for each document,
in the order of the text, so that what one command makes is there for the next (so try a document as a whole, `-k
training.md`). What no command makes is in `world`. A
command that cannot run here goes into `CANNOT`, one of another program into `OTHERS`. A new command of `tarflow` needs an
entry in `SMALL`.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import AutoencoderKL
from documented import ALL, TEXTS, WHOLE, filled_in, named, other_lines, shell_lines, words_of
from fid_helpers import save_backbone
from helpers import ROOT, fresh_process
from PIL import Image
from pipelines import make_pipeline
from torch.utils.tensorboard import SummaryWriter

from tarflow.cli.main import main

#: What each command is given behind its own words, where the last of two counts.
TRAINING = (
    "--train.steps 2 --train.num_workers 0 --train.max_minutes null --train.batch_size 2 --train.mixed_precision no --vae.measure_images 4 "
    "--log.eval_images 2 --log.sample_images 2 --log.eval_every 0 --log.sample_every 0 --log.checkpoint_every 0"
)
NETWORK = "--steps 2 --num_workers 0 --max_minutes null --batch_size 2 --mixed_precision no --eval_every 0 --eval_images 2 --checkpoint_every 0"
#: A random network of few numbers in the place of Inception or of what the text names.
FEATURES = "--extractor vit --extractor-weights null"
SMALL = {
    "--help": "",
    "models": "",
    "configs": "",
    "generate": "--decoding sequential",
    "demo": "--port PORT",
    "train": TRAINING,
    "train-vae": NETWORK,
    "train-captions": "--vision vit --image_size null --steps 2 --batch_size 4 --width 16 --heads 2 --vocab_size 300",
    "evaluate captions": "--num 4 --among 2",
    "train-student": f"{NETWORK} --grid_images 2 --num_layers 5 --width 32 --head_dim 32",
    "finetune-decoder": f"{NETWORK} --grid_images 2",
    "cache-latents": "",
    "evaluate likelihood": "--num_images 2",
    "evaluate fid ref": FEATURES,
    "evaluate fid gen": "--num 4",
    "evaluate fid calc": FEATURES,
    "evaluate fid run": f"{FEATURES} --num 4 --gen.num 4",
    "sweep": f"{FEATURES} --gen.num 4 --guidance_scale [2]",
    "reconstruct": "--num 4",
    "report": "--samples 2 --train_images 8 --yardstick_images 2 --likelihood_images 2",
    "exact-flow": "--num 2",
    "compare-decoding": f"{FEATURES} --num 2 --pictures 2 --repeats 1",
    "compare-student": "--num 2 --batch_sizes [1] --repeats 1 --compile false",
    "benchmark sampling": "--batches 1 --repeats 1",
    "benchmark exactness": "--pipelines drawings_class --samples 1 --guidance-scales 2",
    "benchmark training": "--model shape.yaml --batches 1 --repeats 1 --steps 1 --precisions float32 "
    "--variants published eager",
    "benchmark data": "--listing 3000",
    "benchmark memory": "--batch 1 --model shape.yaml",
    "check-reference": "",
    "export": "",
}
#: Further words, for commands that have this in them.
MORE = [
    (r"^exact-flow .*--tool inpaint", "--steps 1"),
    (r"^exact-flow (?!.*--tool ood)", "--pipeline CAPTIONS/pipeline"),  # the shipped ones take longer
    (r"^train (?!.*--init_from)", "--flow.width 32 --flow.head_dim 32 --flow.layers_per_block [1,1]"),
    (
        r"^train (?!.*--init_from).*(emoji|quickstart_text|kind small)",
        "--text.width 16 --text.layers 1 --text.heads 2 --text.vocab_size 300",
    ),
    (r"cuda_graphs", "--train.cuda_graphs false"),
    (r"^train-vae (?!.*vae_emoji)", "--model.norm_num_groups 4 --model.layers_per_block 1"),
    (r"^train-vae (?!.*(f16|vae_emoji))", "--model.block_out_channels [8,8,8,8]"),
    (r"^train-vae .*f16", "--model.block_out_channels [8,8,8,8,8] --loss.perceptual_network mobilenet_v2"),
    (r"^train .*f16_joint", "--joint.loss.perceptual_network mobilenet_v2"),
    (
        r"^train .*f16_joint",
        "--joint.model.block_out_channels [8,8,8,8,8] --joint.model.norm_num_groups 4",
    ),
]
#: Commands that cannot be run here: what is in them, and why.
CANNOT = {
    r"--num_processes": "several processes: test_parallel.py starts them",
    r"OWNER/NAME": "the Hub: test_streams.py reads the like from this machine",
    r"starflow_3B": "published weights of gigabytes: test_conversion.py converts small ones",
    r"compare-flows": "trainings of minutes: test_flow_comparison.py makes small ones",
    r"compare-peers": "trainings of minutes: test_peers.py makes small ones",
    r"compare-noise-levels": "trainings of minutes: test_level_training.py makes small ones",
    r"runs/emoji\w*/pipeline_ema_0.99": "a training of a GPU's minutes: test_export.py exports a small one",
    r"gpu-check": "a GPU, or minutes: test_gpu_check.py makes single checks",
    r"accelerate launch --cpu": "the launcher alone",
}
#: Lines of blocks that are none of the project's commands: what they begin with, and why they are not run.
OTHERS = {
    "make ": "installs and tests, for minutes",
    "pip install ": "installs",
    "git clone ": "fetches",
    "source ": "the shell's",
    "export ": "the shell's",
    "test -d ": "the shell's",
    "srun ": "a cluster's scheduler",
    "pre-commit ": "another program",
    "python -m pytest": "tests",
    "--": "a part of a command",
}
#: The folders that `imagenette_class` knows.
WORDNET = tuple(yaml.safe_load((ROOT / "configs/imagenette_class.yaml").read_text())["data"]["class_names"])


def pictures(path: Path, classes: tuple[str, ...] = (), count: int = 9) -> Path:
    """A zip archive of random pictures, two splits of them, in class folders or with captions."""
    generator = np.random.default_rng(0)
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(2 * count):
            folder = f"{classes[i % len(classes)]}/" if classes else ""
            name = f"{'train' if i < count else 'validation'}/{folder}{i:02d}.png"
            with archive.open(name, "w") as file:
                Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
            row = {
                "text": f"thing {i}",
                "caption": f"a thing {i}",
                "style": ("twemoji", "noto", "fluent")[i % 3],
                "keywords": f"kind {i % 5}",
                "emoji": f"e{i}",
            }
            rows.append(json.dumps({"file_name": name, **row}) + "\n")
        if not classes:
            archive.writestr("metadata.jsonl", "".join(rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: archives of pictures, trained pipelines, weights of other networks."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("base")
    for name in ("emoji.zip", "my_pictures.zip", "pictures.zip"):
        pictures(folder / name)
    pictures(folder / "nette.zip", WORDNET, len(WORDNET))
    save_backbone(folder / "mobilenet_v2.safetensors", "mobilenet_v2")
    save_backbone(folder / "vgg16.pth", "mobilenet_v2")  # half a gigabyte less
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for name, target in (("pictures.zip", "data"), ("pictures.zip", "pictures"), ("nette.zip", "my_pictures")):
        with zipfile.ZipFile(folder / name) as archive:
            archive.extractall(folder / target)
    for name, conditioning in (("captions", "prefix"), ("classes", "class_prefix")):
        make_pipeline(conditioning, sample_size=8).save_pretrained(folder / name / "pipeline")
        with SummaryWriter(folder / name / "logs") as writer:
            writer.add_scalar("train/loss", 1.0, 1)
    (folder / "captions/pipeline/examples.json").write_text('["thing 1", "thing 2"]')
    shape = {"layers_per_block": [1, 2], "width": 64, "head_dim": 32, "conditioning": "class_prefix"}
    shape = {"data": {"image_size": 64}, "vae": {"name": "none"}, "flow": {"patch_size": 8, **shape}}
    (folder / "shape.yaml").write_text(yaml.safe_dump(shape))
    hub = folder / "stabilityai/sd-vae-ft-ema"
    AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, **vae_blocks(4)).save_pretrained(hub)
    return folder


def vae_blocks(number: int) -> dict[str, tuple[str, ...]]:
    """Arguments of an autoencoder of so many blocks."""
    return {
        f"{way.lower()}_block_types": (f"{way}{name}Block2D",) * number
        for way, name in (("Down", "Encoder"), ("Up", "Decoder"))
    }


def world(case: tuple[Path, str], base: Path) -> Path:
    """The folder of a document, with what its commands take for granted and none before made."""
    folder = base / "worlds" / re.sub(r"\W", "_", str(case[0].relative_to(ROOT)))
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "configs").symlink_to(ROOT / "configs")
        for path in base.iterdir():
            if path.name not in ("worlds", "captions", "classes"):
                (folder / path.name).symlink_to(path)
    given = re.sub(r"--save_to \S+", "", case[1])  # what the command makes itself
    for run in re.findall(r"(runs/\w+)/pipeline", f"{given} {taken_for_granted(case[1])}"):
        if not (folder / run).exists():
            shutil.copytree(base / ("classes" if "class" in run else "captions"), folder / run)
    for reference in re.findall(r"--ref (\S+)", case[1]):
        if not (folder / reference).exists():
            (folder / reference).symlink_to(base / "data/validation")
    return folder


def taken_for_granted(command: str) -> str:
    """Pipelines that a configuration names."""
    named = {"fid_example": "runs/quickstart/pipeline", "finetune-decoder --config decoder": "runs/emoji_text/pipeline"}
    return " ".join(pipeline for config, pipeline in named.items() if config in command)


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def key_of(words: list[str]) -> str:
    """The command with its subcommands."""
    length = {"evaluate": 3 if "fid" in words[:2] else 2, "benchmark": 2}.get(words[0], 1)
    return " ".join(words[:length])


def reason(command: str) -> str | None:
    """Why a command cannot run here."""
    return next((why for what, why in CANNOT.items() if re.search(what, command)), None)


def runnable() -> Iterator[tuple[Path, str]]:
    """Commands to run, each once for a document."""
    return iter(dict.fromkeys(case for case in (*ALL, *WHOLE) if reason(case[1]) is None))


@pytest.fixture(autouse=True)
def one_thing_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each command begins as in a process of its own; a page is not served for ever."""
    fresh_process()
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda app: app.close())
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("case", list(runnable()), ids=named)
def test_a_documented_command_runs(
    case: tuple[Path, str], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = filled_in(words_of(case[1]))
    key = key_of(words)
    assert key in SMALL, f"tarflow {key} needs smaller numbers in SMALL"
    words += [word.replace("PORT", str(free_port())) for word in SMALL[key].split()]
    for what, more in MORE:
        if re.search(what, " ".join(words)):
            words += more.replace("CAPTIONS", str(base / "captions")).split()
    monkeypatch.chdir(world(case, base))
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, f"{' '.join(words)}: {capsys.readouterr().err}"


def test_every_line_of_every_block_is_run_or_has_a_reason() -> None:
    unknown = []
    for file in (*TEXTS, ROOT / "CONTRIBUTING.md"):
        lines = list(shell_lines(file.read_text(encoding="utf-8"), ("bash", "sh", "console")))
        for line in other_lines(lines):
            if line and not line.startswith(tuple(OTHERS)):
                unknown.append(f"{file.name}: {line}")
    assert not unknown, unknown


def test_reasons_are_of_commands_that_are_there() -> None:
    commands = [command for _, command in (*ALL, *WHOLE)]
    assert [what for what in CANNOT if not any(re.search(what, command) for command in commands)] == []
