"""Entry point: `tarflow COMMAND …`."""

from __future__ import annotations

import sys
from importlib.metadata import version

from tarflow.cli.parsing import dispatch
from tarflow.common.command import ending

#: Commands by what they are for, each with a line of help; a command's module has its name, with underscores.
GROUPS = {
    "draw": {
        "generate": "pictures from captions, from classes, or from nothing",
        "demo": "a web page that draws, on this machine",
        "exact-flow": "what only an exact flow can do: inpainting, likelihoods, interpolation, a picture for each",
        "models": "list the pipelines that ship with this package",
    },
    "train": {
        "train": "a model on pictures",
        "configs": "list the configurations that ship with this package, and tell where they are",
        "cache-latents": "encode pictures once, for training without the autoencoder",
        "train-vae": "an autoencoder",
        "finetune-decoder": "a pipeline's decoder, to take away the training noise",
        "train-student": "a student of a model, which draws in one pass",
        "train-captions": "a small model of pictures and captions, which measures samples of captions",
    },
    "measure": {
        "evaluate": "fid: how near samples are to real pictures; likelihood: of held-out ones; captions: do they fit",
        "sweep": "find how to draw best: guidance, denoising, decoding and more, in a table and plots",
        "report": "one HTML file about a pipeline: samples, nearest training pictures, likelihoods, curves",
        "reconstruct": "what a pipeline's autoencoder makes of pictures: the floor of distances",
        "benchmark": "speed, memory and exactness on this machine",
        "gpu-check": "all that must be measured on a GPU, what is worth most first",
        "compare-decoding": "ways of removing the training noise, side by side",
        "compare-student": "a student beside its flow",
        "compare-peers": "a flow and its student beside a DiT by flow matching, side by side",
        "compare-noise-levels": "flows of one noise level and of many, trained alike",
        "compare-flows": "NICE, RealNVP, Glow, IAF, TARFlow and STARFlow, side by side",
    },
    "convert": {
        "convert": "a published TARFlow, STARFlow or iTARFlow checkpoint to a pipeline",
        "check-reference": "compare this implementation with what the published code computed",
        "export": "a pipeline to 16 bits",
    },
}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)
#: What has no command: tools of those who work on the project itself.
SCRIPTS = ("emoji_pictures", "screenshot_demo")

HELP = """usage: tarflow COMMAND …

Latent normalizing flows for images.

{commands}

examples:
  tarflow generate "a red heart, noto style" --pipeline emoji --out heart.png
  tarflow train --config quickstart_text --output runs/mine

options:
  -h, --help        this help; `tarflow COMMAND --help` has each command's
  --version         the version

Trainings, cache-latents, evaluate fid and sweep also run on several devices:
  accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli COMMAND …
For work on the project itself: python -m tarflow.scripts.NAME --help, with a NAME of {scripts}"""


def help_text() -> str:
    """The help: the groups of commands, with a line each."""
    width = max(map(len, COMMANDS))
    groups = (
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {line}" for name, line in lines.items())])
        for title, lines in GROUPS.items()
    )
    return HELP.format(commands="\n\n".join(groups), scripts=" or ".join(SCRIPTS))


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors and Ctrl-C end it as `ending` says.

    Args:
        argv: the arguments; None takes those of the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(f"tarflow {version('tarflow')}")
        return
    with ending():
        dispatch("tarflow", COMMANDS, argv, help_text())
