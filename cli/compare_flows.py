"""NICE, RealNVP, Glow, IAF, TARFlow and STARFlow side by side: the same data, number of parameters and steps.

    tarflow compare-flows --quick true
    tarflow compare-flows --quick true --parts '[plane, digits]' --output runs/flows

Densities of the plane, digits of scikit-learn, latents of the project's drawings, and memory against depth. Each
training is kept in a file of its own, so the same command goes on where it stopped; tables (flows.md) and pictures
are made of all. pip install 'tarflow[family]' brings scikit-learn, and zuko, whose flows stand beside ours.
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.family.settings import FlowComparison


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            FlowComparison,
            argv,
            __doc__,
            "tarflow compare-flows",
            lambda config: check_writable(config.output, folder=True),
        )
        from tarflow.experiments.family.comparison import compare_flows

        path = compare_flows(config)
    print(path.read_text(encoding="utf-8"))
