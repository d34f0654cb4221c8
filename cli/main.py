"""Entry point: `tarflow COMMAND …`."""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import version

from tarflow.cli.parsing import dispatch
from tarflow.common.command import ending

HELP = """usage: tarflow COMMAND …

Latent normalizing flows for images.

commands:
  generate       draw pictures from captions, from classes, or from nothing
  train          train a model on pictures
  train-student  train a student of a model, which draws in one pass
  evaluate       fid: how near drawn pictures are to real ones; likelihood: of held-out pictures
  demo           a web page that draws, on this machine
  models         list the pipelines that ship with this package
  configs        list the configurations that ship with this package, and tell where they are

examples:
  tarflow generate "a red apple" --pipeline runs/emoji_text/pipeline --out apple.png
  tarflow train --config quickstart_text --output runs/mine

options:
  -h, --help     this help; `tarflow COMMAND --help` has each command's
  --version      the version

Further commands: python -m tarflow.scripts.NAME --help, with a NAME of
{scripts}"""

SCRIPTS = (
    *("benchmark", "cache_latents", "check_reference", "compare_decoding", "compare_flows", "compare_student"),
    *("convert_checkpoint", "exact_flow", "export_pipeline", "finetune_decoder", "gpu_check", "reconstruct"),
    *("report", "screenshot_demo", "sweep", "train_vae"),
)
COMMANDS = ("generate", "train", "train-student", "evaluate", "demo", "models", "configs")


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
        dispatch("tarflow", COMMANDS, argv, HELP.format(scripts=textwrap.fill(", ".join(SCRIPTS), 80)))
