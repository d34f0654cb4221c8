"""NICE, RealNVP, Glow, IAF, TARFlow and STARFlow side by side: the same data, number of parameters and steps.

    python -m tarflow.scripts.compare_flows --quick true
    python -m tarflow.scripts.compare_flows --quick true --parts '[plane, digits]' --output runs/flows

Densities of the plane, digits of scikit-learn, latents of the project's drawings, and memory against depth. Each
training is kept in a file of its own, so the same command goes on where it stopped; tables (``flows.md``) and pictures
are made of all. ``pip install 'tarflow[family]'`` brings scikit-learn, and zuko, whose flows stand beside ours.
"""

from __future__ import annotations

from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.experiments.family.comparison import FlowComparison, compare_flows


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = parse_dataclass(FlowComparison, argv, __doc__)
        path = compare_flows(config)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
