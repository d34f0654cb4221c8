"""A student beside its flow: images per second, distance from the flow's exact inverse, pictures of the same noise.

    tarflow compare-student --pipeline runs/NAME/pipeline --out comparison

The folder gets a table (student.md, student.json) and samples.png, the flow's samples above the student's.
What the samples are worth, `tarflow sweep --decoding '[sequential, student]'` measures.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.settings import StudentComparisonConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            StudentComparisonConfig,
            argv,
            __doc__,
            "tarflow compare-student",
            lambda config: check_writable(config.out, folder=True),
        )
        from tarflow.experiments.students import compare_student
        from tarflow.pipeline.opening import open_pipeline

        compare_student(config, open_pipeline(config.pipeline))
    print((Path(config.out).expanduser() / "student.md").read_text(encoding="utf-8"))
