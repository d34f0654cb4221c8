"""A student beside its flow: images per second, distance from the flow's exact inverse, pictures of the same noise.

    tarflow compare-student --pipeline runs/NAME/pipeline --out comparison

The folder gets a table (student.md, student.json) and samples.png, the flow's samples above the student's.
What the samples are worth, `tarflow sweep --decoding '[sequential, student]'` measures.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.common.files import check_writable


def main(argv: list[str] | None = None) -> None:
    from tarflow.experiments.students import StudentComparisonConfig, compare_student
    from tarflow.pipeline.opening import open_pipeline

    with ending():
        config, _ = parse_dataclass(StudentComparisonConfig, with_config_file(argv), __doc__, "tarflow compare-student")
        check_writable(config.out, folder=True)
        compare_student(config, open_pipeline(config.pipeline))
    print((Path(config.out).expanduser() / "student.md").read_text(encoding="utf-8"))
