"""YAML file and command line → `RunConfig`."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import jsonargparse

from tarflow.common.arguments import parse_dataclass, plain_message
from tarflow.flows.trajectory.kinds import KINDS, kind_of
from tarflow.flows.trajectory.names import FLOW
from tarflow.training.flow.config import RunConfig


def parse_config(
    argv: list[str] | None = None, description: str | None = None, prog: str | None = None
) -> tuple[RunConfig, str]:
    """The configuration of a training run, see `parse_dataclass`; unknown keys of the flow are an error too."""
    config, resolved = parse_dataclass(RunConfig, argv, description, prog)
    check_flow_keys(config.flow)
    return config, resolved


def check_flow_keys(flow: dict[str, Any]) -> None:
    """Errors of the flow section: an unknown key, with a list of the known ones, and a value of a wrong type."""
    kind, flow = kind_of(flow)
    known = [name for name in inspect.signature(KINDS[kind].__init__).parameters if name != "self"]
    if unknown := sorted(set(flow) - set(known)):
        section = "the flow section" if kind == FLOW else f"the flow section of kind {kind!r}"
        raise ValueError(f"unknown key flow.{unknown[0]}; {section} has kind, {', '.join(known)}")
    parser = flow_parser(kind)
    required = {"in_channels": 1, "sample_size": 1}
    try:
        parser.parse_object({"flow": {**required, **flow}})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(plain_message(" ".join(str(error).split()))) from error


@cache
def flow_parser(kind: str) -> jsonargparse.ArgumentParser:
    """What reads the flow section of a kind; made once, as that takes longer than reading."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KINDS[kind], "flow")
    return parser
