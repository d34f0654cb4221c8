"""What an exact flow can do with pictures, one picture for each tool.

    tarflow exact-flow --tool encode --pipeline drawings_text --out encode.png
    tarflow exact-flow --tool inpaint --pipeline runs/NAME/pipeline --data.source folder \\
        --data.path my_pictures.zip --data.caption_template '{text}' --num 4 --out inpaint.png
    tarflow exact-flow --tool ood --pipeline drawings_text --num 500 --outside.source folder \\
        --outside.path my_pictures.zip --out ood.png

Pictures are those of --data, with their captions or classes as conditions. It prints what was measured.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import read_settings
from tarflow.common.charts import check_matplotlib
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.settings import ExactFlowConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(ExactFlowConfig, argv, __doc__, "tarflow exact-flow", check_place)
        from tarflow.experiments.exact_flow import draw_tool

        draw_tool(config)


def check_place(config: ExactFlowConfig) -> None:
    """Whether the picture can be written.

    Raises:
        ValueError: for another format, or a place that cannot be written to.
    """
    if Path(config.out).suffix.lower() != ".png":
        raise ValueError(f"out must be the name of a .png file, got {config.out!r}")
    check_writable(config.out)
    if config.tool == "ood":
        check_matplotlib()
