"""Write pictures, and what a pipeline's autoencoder makes of them: the floor of any distance that its samples can reach.

    tarflow reconstruct --pipeline runs/NAME/pipeline --data.source folder --data.path pictures.zip \\
        --split validation --num 1000 --out floor

It writes PNG files into floor/original and floor/reconstructed, for `tarflow evaluate fid calc --samples`, and prints
the mean peak signal-to-noise ratio. Pictures lie evenly in their split, as folders are sorted by class.
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.evaluation.reconstruction.settings import ReconstructConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            ReconstructConfig,
            argv,
            __doc__,
            "tarflow reconstruct",
            lambda config: check_writable(config.out, folder=True),
        )
        from tarflow.evaluation.reconstruction.floor import reconstruct

        count, ratio = reconstruct(config)
    print(f"{count} pictures and their reconstructions, {ratio:.2f} dB, are in {config.out}")
