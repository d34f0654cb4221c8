"""Train a student of a pipeline's flow, which makes a picture in one pass.

    python train_student.py --config configs/student_drawings.yaml

trains that of the shipped `drawings_class` on drawings; `tarflow train-student --help` has the command for own pictures.

The flow stays as it is: it turns noisy pictures into noise, and the student learns the way back, with the noise taken
away and guidance included. The student is put into the pipeline's folder, or with ``--save_to FOLDER`` into a copy of it;
``pipe(…, decoding="student")`` draws with it. ``--resume latest`` goes on from the last checkpoint.
"""

from __future__ import annotations

from tarflow.cli.train_student import main

if __name__ == "__main__":
    main(prog="train_student.py", description=__doc__)
