"""NICE, RealNVP, Glow, IAF, TARFlow and STARFlow side by side: the same data, number of parameters and steps.

    tarflow compare-flows --quick true
    tarflow compare-flows --quick true --parts '[plane, digits]' --output runs/flows

Densities of the plane, digits of scikit-learn, latents of the project's drawings, and memory against depth. Each
training is kept in a file of its own, so the same command goes on where it stopped; tables (flows.md) and pictures
are made of all. pip install 'tarflow[family]' brings scikit-learn, and zuko, whose flows stand beside ours.
"""

from __future__ import annotations

from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending


def main(argv: list[str] | None = None) -> None:
    from tarflow.experiments.family.comparison import FlowComparison, compare_flows

    with ending():
        path = compare_flows(
            parse_dataclass(FlowComparison, with_config_file(argv), __doc__, "tarflow compare-flows")[0]
        )
    print(path.read_text(encoding="utf-8"))
