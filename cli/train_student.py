"""Train a student of a pipeline's flow, which makes a picture in one pass.
It is put into the pipeline's folder, or with --save_to FOLDER into a copy of the pipeline.

    tarflow train-student --config student_drawings
    tarflow train-student --config student_emoji --pipeline runs/mine/pipeline \\
        --data.path my_pictures.zip --data.where null --data.caption_template null \\
        --data.more_caption_templates '[]' --output runs/mine_student --save_to runs/mine_student/pipeline

The first is a student of drawings_class, trained on the project's drawings; its file sets save_to, to
runs/drawings_student/pipeline. The second learns from pictures of your own.

The flow stays as it is: it turns noisy pictures into noise, and the student learns the way back, with the noise taken
away and guidance included. `tarflow generate --decoding student` draws with it, and in Python
pipe(…, decoding="student"). --resume latest goes on from the last checkpoint. To train on several devices:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli train-student …
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.training.student.config import StudentConfig


def main(argv: list[str] | None = None, prog: str = "tarflow train-student", description: str | None = __doc__) -> None:
    """Train; errors end as `ending` says.

    Args:
        argv: the settings; None takes those of the command line.
        prog, description: how the help calls this, and what it says of it.
    """
    with ending():
        settings = read_settings(StudentConfig, argv, description, prog)
        from tarflow.training.loop.stopping import exit_status, launched_process
        from tarflow.training.student.task import train_student

    with launched_process(), ending():
        if status := exit_status(train_student(*settings)):
            raise SystemExit(status)
