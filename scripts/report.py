"""Report on a pipeline: one HTML file with samples, nearest training pictures, likelihoods, curves and settings.

    python -m tarflow.scripts.report --pipeline runs/NAME/pipeline --data.source folder \\
        --data.path pictures.zip --out report.html [--run runs/NAME] [--metrics samples/metrics.json] [--extractor inception]

The file needs no network and no scripts. The data must be what the model was trained on.
"""

from __future__ import annotations

from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.evaluation.reports.contents import ReportConfig
from tarflow.evaluation.reports.html import write_report
from tarflow.pipeline.loading.device import best_device


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = parse_dataclass(ReportConfig, argv, __doc__)
        path = write_report(config, best_device())
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
