"""What the commands' parsers share. Nothing here takes long to import."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tarflow import configs
from tarflow.common.arguments import parse_dataclass
from tarflow.data.config import DataConfig
from tarflow.data.place import check_data
from tarflow.pipeline.loading.place import locate

#: Of the commands that draw, whose default is the same.
PIPELINE_HELP = (
    "a folder, a shipped name (see `tarflow models`) or a hub id (default: the shipped pipeline of emoji, or else the "
    "quick start's)"
)


class CommandParser(argparse.ArgumentParser):
    """A parser whose help keeps the description's lines and states defaults, and whose errors are one sentence."""

    def __init__(self, prog: str, description: str, arguments: str = ""):
        usage = f"{prog} {arguments}".rstrip() + " [options]"
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options with underscores are those with dashes, as settings and Python have them."""
        argv = sys.argv[1:] if args is None else args
        return super().parse_known_args([dashed(argument) for argument in argv], namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def dashed(argument: str) -> str:
    """``--guidance_scale=2`` as ``--guidance-scale=2``; what is no option as it is."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if re.fullmatch(r"--[a-z][\w-]*", name) else argument


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


def read_settings(
    kind: type, argv: list[str] | None, description: str | None, prog: str, check: Callable[[Any], None] | None = None
) -> tuple[Any, str]:
    """A command's settings, and their resolved YAML; what can be said of them at once is said before libraries are loaded.

    Args:
        kind: the dataclass.
        argv: the arguments; None takes those of the command line.
        description, prog: what the help says the command does, and how it calls it.
        check: refuses settings by what is quickly known.

    Raises:
        ValueError: with one sentence, also for a pipeline or data that is not there.
    """
    arguments = with_config_file(argv)
    settings, resolved = parse_dataclass(kind, arguments, description, prog)
    check_places(settings)
    check_pictures_named(kind, arguments)
    if check is not None:
        check(settings)
    loading()
    return settings, resolved


def check_pictures_named(kind: type, argv: Sequence[str]) -> None:
    """Refuse to take the project's own drawings where nobody has said of which pictures a command is.

    Args:
        kind: the dataclass of settings; one whose ``data`` has a default may be left alone.
        argv: the arguments, see `with_config_file`.

    Raises:
        ValueError: if neither an argument nor a configuration file names them.
    """
    needs = any(
        field.name == "data"
        and field.type in (DataConfig, DataConfig.__name__)
        and field.default is field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(kind)
    )
    named = (argument.partition("=")[0] in ("--data", "--data.source", "--data.path") for argument in argv)
    if needs and not any(named) and not any(names_pictures(found.get("data")) for found in sections_of_files(argv)):
        raise ValueError(
            "of which pictures? give --data.source folder --data.path PATH, or --data.source drawings for the project's own"
        )


def names_pictures(section: Any) -> bool:
    """Whether a file's section ``data`` says where pictures come from."""
    return isinstance(section, dict) and bool(section.keys() & {"source", "path"})


def sections_of_files(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the files of ``--config`` have at the top; they were read before, and are YAML."""
    following = zip(argv, [*argv[1:], ""], strict=True)
    for argument, after in following:
        name, equals, value = argument.partition("=")
        if name == "--config":
            text = Path(value if equals else after).read_text(encoding="utf-8")
            yield yaml.safe_load(text) or {}


def check_places(settings: Any) -> None:
    """Refuse pipelines and data that are not where settings say, at any depth.

    Raises:
        ValueError: that names the first.
    """
    if isinstance(settings, DataConfig):
        check_data(settings)
        if settings.source == "folder":
            from tarflow.data.folder import check_pictures  # here: generate needs no Pillow to read its options

            check_pictures(settings)
    elif isinstance(settings, dict):
        for value in settings.values():
            check_places(value)
    elif dataclasses.is_dataclass(settings):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name == "pipeline" and isinstance(value, str):
                locate(value)
            else:
                check_places(value)


def loading() -> None:
    """Load the libraries, which takes seconds: a person at a terminal is told, and the next line takes that one's place."""
    if sys.stderr.isatty():
        print("loading libraries …", end="\r", file=sys.stderr, flush=True)
    from tarflow.cli.quiet import hush_libraries

    hush_libraries()


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
