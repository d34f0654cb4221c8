"""A student beside its flow: images per second, distance from the flow's exact inverse, pictures of the same noise.

    python -m tarflow.scripts.compare_student --pipeline runs/NAME/pipeline --out comparison

The folder gets a table (``student.md``, ``student.json``) and ``samples.png``, the flow's samples above the student's.
What the samples are worth, ``python -m tarflow.scripts.sweep --decoding '[sequential, student]'`` measures.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.students import StudentComparisonConfig, compare_student
from tarflow.pipeline.opening import open_pipeline


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = parse_dataclass(StudentComparisonConfig, argv, __doc__)
        check_writable(config.out, folder=True)
        compare_student(config, open_pipeline(config.pipeline))
    print((Path(config.out).expanduser() / "student.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
