"""`tarflow gpu-check`: what must be measured on a GPU, what is worth most first."""

from __future__ import annotations

import argparse
from pathlib import Path

from tarflow.benchmarks.choices import GPU_CHECKS, GPU_PARTS
from tarflow.cli.parsing import CommandParser, loading
from tarflow.common.command import ending
from tarflow.common.files import check_writable

DESCRIPTION = f"""All checks that need a GPU, for whoever has one for minutes: correct, and how fast?

  tarflow gpu-check --part 1 --output runs/gpu_check     five minutes
  tarflow gpu-check --part 2 --output runs/gpu_check     six more; part 3 takes five
  tarflow gpu-check --only sampling:120 graphs           some checks, and seconds for them

Checks, with the seconds that each may take (what one leaves over is the next ones'):
  {", ".join(f"{name} {seconds}" for name, seconds in GPU_CHECKS.items())}

The folder gets gpu_check.json and gpu_check.md, written anew with each number that is measured; checks of the same
device that are there already stay until they are made again. A check that fails or has no time left is reported, not
hidden, and the exit status is 1. --small takes a small model and any device, to see that the command itself works."""


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("tarflow gpu-check", DESCRIPTION)
    parser.add_argument("--output", default="runs/gpu_check", metavar="DIR", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all checks together")
    parser.add_argument("--part", type=int, choices=GPU_PARTS, help="one of the calls that together make all checks")
    parser.add_argument(
        "--only", type=chosen, nargs="+", metavar="NAME[:SECONDS]", help="some of the checks, and their times"
    )
    parser.add_argument("--emoji", metavar="ZIP", help="captioned emoji for the small training (else drawings)")
    parser.add_argument("--small", action="store_true", help="a small model on any device")
    arguments = parser.parse_args(argv)
    if arguments.part is not None and arguments.only is not None:
        parser.error("--part and --only exclude each other")
    with ending():
        if not arguments.minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {arguments.minutes:g}")
        if arguments.emoji is not None and not Path(arguments.emoji).expanduser().is_file():
            raise ValueError(f"there is no file {arguments.emoji!r}: --emoji takes a zip archive with metadata.jsonl")
        folder = Path(arguments.output).expanduser()
        check_writable(folder, folder=True)
        loading()
        from tarflow.pipeline.loading.device import best_device  # imported here, as what measures: it takes seconds

        device = best_device()
        if device != "cuda" and not arguments.small:
            raise ValueError("no CUDA device here; --small runs the command itself on any machine")
        from tarflow.benchmarks.gpu_checks import Task
        from tarflow.benchmarks.gpu_report import run_checks

        names = GPU_PARTS.get(arguments.part, tuple(GPU_CHECKS))
        checks = {name: GPU_CHECKS[name] for name in names} if arguments.only is None else dict(arguments.only)
        passed = run_checks(folder, checks, arguments.minutes, Task(device, arguments.small, 0.0, data=arguments.emoji))
    if not passed:
        raise SystemExit(1)


def chosen(text: str) -> tuple[str, float]:
    """A check and its seconds, of NAME or NAME:SECONDS."""
    name, _, seconds = text.partition(":")
    if name not in GPU_CHECKS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(GPU_CHECKS)}")
    try:
        value = float(seconds) if seconds else float(GPU_CHECKS[name])
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"the seconds of {name} must be a number above 0, got {seconds!r}")
    return name, value
