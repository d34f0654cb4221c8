"""Train a student of a pipeline's flow, which makes a picture in one pass.

    accelerate launch train_student.py --pipeline runs/NAME/pipeline --config configs/student_drawings.yaml

The flow stays as it is: it turns noisy pictures into noise, and the student learns the way back, with the noise taken
away and guidance included. The student is put into the pipeline's folder, or with ``--save_to FOLDER`` into a copy of it;
``pipe(…, decoding="student")`` draws with it. ``--resume latest`` goes on from the last checkpoint.
"""

from __future__ import annotations

from tarflow.common.command import ending
from tarflow.training.arguments import parse_dataclass
from tarflow.training.student import train_student
from tarflow.training.student_config import StudentConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        train_student(*parse_dataclass(StudentConfig, argv, __doc__))


if __name__ == "__main__":
    main()
