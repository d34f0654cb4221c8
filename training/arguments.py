"""YAML file and command line → `RunConfig`."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import jsonargparse

from tarflow.flows.model import TARFlowModel
from tarflow.training.config import RunConfig


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Defaults and types behind each option; the description's lines as they are."""


def parse_config(
    argv: list[str] | None = None, description: str | None = None, prog: str | None = None
) -> tuple[RunConfig, str]:
    """The configuration of a training run, see `parse_dataclass`; unknown keys of the flow are an error too."""
    config, resolved = parse_dataclass(RunConfig, argv, description, prog)
    check_flow_keys(config.flow)
    return config, resolved


def parse_dataclass(
    kind: type, argv: list[str] | None = None, description: str | None = None, prog: str | None = None
) -> tuple[Any, str]:
    """Read ``--config FILE`` and ``--section.key value`` overrides of a dataclass.

    Args:
        kind: the dataclass.
        argv: the arguments; None takes those of the command line.
        description, prog: what the help says the command does, and how it calls it.

    Returns:
        the configuration, and its resolved YAML.

    Raises:
        ValueError: with one sentence for an unknown key, a wrong type or a value out of range.
    """
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--key value] [--section.key value] …",
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_class_arguments(kind, None, sub_configs=False)
    try:
        namespace = parser.parse_args(argv)
        resolved = parser.dump(namespace, skip_none=False)
        arguments = vars(parser.instantiate(namespace))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    arguments.pop("config", None)
    return kind(**arguments), resolved


def check_flow_keys(flow: dict[str, Any]) -> None:
    """An unknown key of the flow section is an error that lists the known ones."""
    known = [name for name in inspect.signature(TARFlowModel.__init__).parameters if name != "self"]
    if unknown := sorted(set(flow) - set(known)):
        raise ValueError(f"unknown key flow.{unknown[0]}; the flow section has {', '.join(known)}")


def fail(error: Exception) -> None:
    """Print one sentence and leave with exit status 2. Of an error in a reading process, whose text is a traceback,
    that is the last line."""
    message = str(error).strip()
    if message.startswith("Caught "):
        message = message.splitlines()[-1].removeprefix("ValueError: ")
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
