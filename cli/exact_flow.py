"""What an exact flow can do with pictures, one picture for each tool.

    tarflow exact-flow --tool encode --pipeline drawings_text --out encode.png
    tarflow exact-flow --tool inpaint --pipeline runs/NAME/pipeline --data.source folder \\
        --data.path my_pictures.zip --data.caption_template '{text}' --num 4 --out inpaint.png
    tarflow exact-flow --tool ood --pipeline drawings_text --num 500 --outside.source folder \\
        --outside.path my_pictures.zip --out ood.png

Pictures are those of --data, with their captions or classes as conditions. It prints what was measured.
"""

from __future__ import annotations

from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending


def main(argv: list[str] | None = None) -> None:
    from tarflow.experiments.exact_flow import ExactFlowConfig, draw_tool

    with ending():
        draw_tool(parse_dataclass(ExactFlowConfig, with_config_file(argv), __doc__, "tarflow exact-flow")[0])
