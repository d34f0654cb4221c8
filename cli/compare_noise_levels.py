"""Flows of one noise level beside flows of all levels up to it, trained for the same time, drawn from in some steps.

    tarflow compare-noise-levels --train pixels_class --match true --minutes 20 --out comparison
    tarflow compare-noise-levels --train imagenette_levels --options '[--data.path, nette.zip]' --ref stats --out comparison

For each of the levels two trainings, then a row for each number of steps: noise_levels.md, and samples_LEVEL.png with samples
of the same noise. What is trained or measured already is not done again.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.configs import resolve
from tarflow.data.place import status_of
from tarflow.experiments.settings import LevelComparisonConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            LevelComparisonConfig, argv, __doc__, "tarflow compare-noise-levels", check_comparison
        )
        from tarflow.experiments.noise_levels import compare_noise_levels
        from tarflow.pipeline.loading.device import best_device

        compare_noise_levels(config, best_device())
    print((Path(config.out).expanduser() / "noise_levels.md").read_text(encoding="utf-8"))


def check_comparison(config: LevelComparisonConfig) -> None:
    """Whether there are such a configuration and such pictures, and the result can be written."""
    check_writable(config.out, folder=True)
    resolve(config.train)
    if config.ref is not None:
        status_of(config.ref)  # not after the first trainings
