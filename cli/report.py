"""Report on a pipeline: one HTML file with samples, nearest training pictures, likelihoods, curves and settings.

    tarflow report --pipeline runs/NAME/pipeline --data.source folder \\
        --data.path pictures.zip --out report.html [--run runs/NAME] [--metrics samples/metrics.json] [--extractor inception]

The file needs no network and no scripts. The data must be what the model was trained on.
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.evaluation.reports.settings import ReportConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            ReportConfig, argv, __doc__, "tarflow report", lambda config: check_writable(config.out)
        )
        from tarflow.evaluation.reports.html import write_report
        from tarflow.pipeline.loading.device import best_device

        path = write_report(config, best_device())
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
