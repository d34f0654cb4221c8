"""FID and its relatives: reference statistics, samples, and the numbers between them.

    tarflow evaluate fid ref --data pictures.zip --out stats
    tarflow evaluate fid gen --pipeline runs/NAME/pipeline --num 50000 --out samples
    tarflow evaluate fid calc --ref stats --samples samples
    tarflow evaluate fid run --config fid_example

ref computes the reference statistics of pictures, gen draws samples of a pipeline, calc compares the two; run does all
three. On several devices, with the same result:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli evaluate fid …

Inception's weights are downloaded unless --inception-weights names them; another extractor (--extractor NAME
--extractor-weights PATH) gives Fréchet distances that are never called FID.
"""

from __future__ import annotations

import sys
from typing import Any

from tarflow.cli.fid_settings import CalcConfig, RefConfig, RunConfig
from tarflow.cli.parsing import read_settings
from tarflow.common.arguments import underscored
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.data.place import status_of
from tarflow.evaluation.samples.settings import GenerationConfig

#: The settings of each step, which is a function of `tarflow.cli.fid_steps`.
COMMANDS: dict[str, type] = {"ref": RefConfig, "gen": GenerationConfig, "calc": CalcConfig, "run": RunConfig}


def main(argv: list[str] | None = None, prog: str = "tarflow evaluate fid", description: str | None = __doc__) -> None:
    """Run one of `COMMANDS`; errors end as `ending` says.

    Args:
        argv: the command and its settings; None takes those of the command line.
        prog, description: how the help calls this, and what it says of it.
    """
    argv = sys.argv[1:] if argv is None else argv
    with ending():
        if argv and argv[0] in ("-h", "--help"):
            print(f"{description}\n{prog} {{{','.join(COMMANDS)}}} --help lists the settings of each.")
            return
        if not argv or argv[0] not in COMMANDS:
            raise ValueError(f"expected a command of {', '.join(COMMANDS)} first, got {argv[0] if argv else 'nothing'}")
        check_data_is_given_once(argv)
        config, _ = read_settings(COMMANDS[argv[0]], argv[1:], description, f"{prog} {argv[0]}", check_paths)
        from tarflow.cli import fid_steps
        from tarflow.training.loop.parallel import started_processes

        getattr(fid_steps, argv[0])(config, started_processes())


def check_data_is_given_once(argv: list[str]) -> None:
    """Refuse a path and a section of the same data, of which the parser would forget the path.

    Raises:
        ValueError: that says so.
    """
    names = {argument.partition("=")[0] for argument in underscored(argv)}
    if "--data" in names and any(name.startswith("--data.") for name in names):
        raise ValueError(
            "give --data PATH or a section --data.source …, not both; --image_size fits pictures of a path"
        )


def check_paths(config: Any) -> None:
    """Refuse pictures that are not there, and places that cannot be written to.

    Raises:
        ValueError: that names the path.
    """
    for name in ("data", "ref", "samples"):
        path = getattr(config, name, None)
        if isinstance(path, str):
            status_of(path)
    for name in ("out", "stats"):
        if path := getattr(config, name, None):
            check_writable(path, folder=isinstance(config, RefConfig | GenerationConfig) or name == "stats")
