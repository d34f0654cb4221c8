"""YAML file and command line → a dataclass of settings."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import jsonargparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Defaults and types behind each option; the description's lines as they are."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        """Types with a range of their own read as all others."""
        return re.sub(r"\bOptional\[(.*)\]$", r"\1 | null", super()._get_type_str(action) or "") or None


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
    parser = parser_of(kind, description, prog)
    try:
        namespace = parser.parse_args(config_first(underscored(sys.argv[1:] if argv is None else argv)))
        resolved = parser.dump(namespace, skip_none=False)
        arguments = vars(parser.instantiate(namespace))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(plain_message(" ".join(str(error).split()), options_of(parser))) from error
    arguments.pop("config", None)
    return kind(**arguments), resolved


@cache
def parser_of(kind: type, description: str | None, prog: str | None) -> jsonargparse.ArgumentParser:
    """What reads a dataclass, see `parse_dataclass`; made once, as that takes longer than reading."""
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--key value] [--section.key value] …",
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; all other arguments count more")
    parser.add_class_arguments(kind, None, sub_configs=False)
    return parser


#: Settings whose keys are the user's own words.
OWN_KEYS = ("sources", "mix", "where", "class_names")


def underscored(argv: Sequence[str]) -> list[str]:
    """Options with dashes as the parser knows them, ``--noise-std`` as ``--noise_std``; words of the user's own stay."""
    found = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        found.append(f"--{known_form(name[2:])}{equals}{value}" if argument.startswith("--") else argument)
    return found


def known_form(name: str) -> str:
    """The name of a setting with underscores, but for keys that are the user's own."""
    parts: list[str] = []
    for part in name.split("."):
        parts.append(part if parts and parts[-1] in OWN_KEYS else part.replace("-", "_"))
    return ".".join(parts)


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """All options that a parser knows."""
    return sorted(option for option in parser._option_string_actions if option.startswith("--"))


def config_first(argv: Sequence[str]) -> list[str]:
    """Arguments with ``--config FILE`` before all others: the parser lets later ones count more, and what is typed is
    meant, wherever it stands."""
    files: list[str] = []
    others: list[str] = []
    left = list(argv)
    while left:
        argument = left.pop(0)
        if argument == "--config" and left:
            files += [argument, left.pop(0)]
        else:
            (files if argument.startswith("--config=") else others).append(argument)
    return [*files, *others]


#: What the parser calls types, in words.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, such as '[1, 2]'",
    "tuple": "a list, such as '[1, 2]'",
    "NoneType": "null",
}


def plain_message(message: str, options: Sequence[str] = ()) -> str:
    """The parser's message on a value of a wrong type, an unknown option, or an unknown setting of a file, as a sentence; any
    other message as it is.

    Args:
        message: on one line.
        options: that there are.
    """
    unknown = re.fullmatch(r"[Uu]nrecognized arguments: (\S+).*", message)
    if unknown is not None:
        name = unknown[1].partition("=")[0]
        near = difflib.get_close_matches(name, options, 1)
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists all")
    unknown = re.fullmatch(r"(?:Group '([^']+)' does not accept option|Option) '([^']+)'(?: is not accepted)?", message)
    if unknown is not None:
        return unknown_setting(".".join(part for part in unknown.groups() if part), options)
    found = re.search(r'Parser key "([^"]+)": (.*)', message)
    if found is None:
        return message
    name, rest = found.groups()
    value = re.search(r"(?:Got value|Given value): (.*?)(?= - Expected| Given value type|$)", rest)
    expected = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", rest)
    kinds = [KINDS.get(kind, kind) if kind else f"one of {choices}" for kind, choices in expected]
    if value is None or not kinds:
        return message
    return f"{name} must be {' or '.join(dict.fromkeys(kinds))}, got {value[1].strip()!r}"


def unknown_setting(name: str, options: Sequence[str]) -> str:
    """A sentence on a setting of a file that there is not; of a whole section that there is not, the section alone."""
    parts, known = name.split("."), [option.removeprefix("--") for option in options]
    sections = [".".join(parts[: count + 1]) for count in range(len(parts))]
    name = next(
        (section for section in sections if not any(f"{one}.".startswith(f"{section}.") for one in known)), name
    )
    near = difflib.get_close_matches(name, known, 1)
    remedy = "take it out of the file that --config names"
    return f"there is no setting {name}" + (
        f"; did you mean {near[0]}? {remedy.capitalize()}" if near else f": {remedy}"
    )
