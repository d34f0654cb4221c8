"""What the commands' parsers share. Nothing here takes long to import."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from tarflow import configs


class CommandParser(argparse.ArgumentParser):
    """A parser whose help keeps the description's lines and states defaults, and whose errors are one sentence."""

    def __init__(self, prog: str, description: str, arguments: str = ""):
        usage = f"{prog} {arguments}".rstrip() + " [options]"
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description's lines as they are; defaults behind each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def dispatch(prog: str, commands: Sequence[str], argv: list[str], help_text: str) -> None:
    """Run the command that the first argument names with the others; without one, print the help.

    Args:
        prog: what the user typed before it.
        commands: names of modules of this package. One is imported when it is called, as its libraries take seconds.

    Raises:
        ValueError: if there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text)
        return
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, 1)
        hint = f"did you mean {near[0]}?" if near else f"{prog} has {', '.join(commands)}"
        raise ValueError(f"unknown command {argv[0]!r}; {hint}")
    importlib.import_module(f"tarflow.cli.{argv[0].replace('-', '_')}").main(argv[1:])


def with_config_file(argv: list[str] | None) -> list[str]:
    """Arguments whose ``--config`` names a file, also if it was the bare name of a shipped configuration.

    Args:
        argv: the arguments; None takes those of the command line.

    Raises:
        ValueError: if there is neither such a file nor such a configuration.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for place, argument in enumerate(arguments):
        if argument == "--config" and place + 1 < len(arguments):
            arguments[place + 1] = configs.resolve(arguments[place + 1])
        elif argument.startswith("--config="):
            arguments[place] = f"--config={configs.resolve(argument.removeprefix('--config='))}"
    return arguments
