"""Find how to draw best: guidance × denoising × decoder × σ × decoding → a table and plots, the best row marked.

    tarflow sweep --gen.pipeline runs/NAME/pipeline --gen.out sweeps/NAME \\
        --gen.num 5000 --ref stats --guidance_scale '[1, 1.5, 2, 3]' --noise_std '[0.2, 0.3]' \\
        --decoding '[sequential, fast]'

--ref is a folder that `tarflow evaluate fid ref` wrote; for models of drawings --match true measures without one. The
folder gets sweep.csv, sweep.md, guidance.png and speed.png. Run it again after an interruption: measured rows stay, and
more values may be added to the lists. On several devices:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli sweep …
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import read_settings
from tarflow.common.charts import check_matplotlib
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.evaluation.reports.settings import SweepConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(SweepConfig, argv, __doc__, "tarflow sweep", check_place)
        from tarflow.evaluation.reports.sweep import run_sweep
        from tarflow.training.loop.parallel import started_processes

        state = started_processes()
        run_sweep(config, None, state.process_index, state.num_processes, state.device, state.wait_for_everyone)
    if state.is_main_process:
        print((Path(config.gen.out).expanduser() / "sweep.md").read_text(encoding="utf-8"))


def check_place(config: SweepConfig) -> None:
    """Whether tables and plots can be written.

    Raises:
        ValueError: if not.
    """
    check_writable(config.gen.out, folder=True)
    check_matplotlib()
