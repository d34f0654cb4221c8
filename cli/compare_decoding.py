"""Ways of removing the training noise side by side: none, score step, learned denoiser, finetuned decoder.

    tarflow compare-decoding --pipeline runs/NAME/pipeline --data.source folder \\
        --data.path my_pictures.zip --num 5000 --ref stats --out comparison

The flow draws each sample once; all methods that the pipeline has decode the same. The folder gets a table
(comparison.md, comparison.json: PSNR and SSIM at the training noise, Fréchet distance, seconds per image), and
samples.png and reconstructions.png with a row for each method.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.settings import ComparisonConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            ComparisonConfig,
            argv,
            __doc__,
            "tarflow compare-decoding",
            lambda config: check_writable(config.out, folder=True),
        )
        from tarflow.experiments.decoding import compare_decoding
        from tarflow.pipeline.opening import open_pipeline

        compare_decoding(config, open_pipeline(config.pipeline))
    print((Path(config.out).expanduser() / "comparison.md").read_text(encoding="utf-8"))
