"""A flow and its student beside a DiT of Diffusers by flow matching: the same latents, parameters, batches and steps.

    tarflow compare-peers --output runs/peers
    tarflow compare-peers --condition class --output runs/peers_class
    tarflow compare-peers --recipe emoji_text --data.source folder --data.path emoji.zip --pictures null \\
        --held_out null --caption_model runs/captions --output runs/peers_emoji

With `--seconds 420` instead of `--steps` each training takes as many steps as fit into 420 seconds of the processor.
Each training goes on where it stopped, and each row of the table is kept as it is measured, so the same command goes on.
Seconds are measured in turns, so that other work on the machine falls on all alike. The folder gets peers.md, peers.json
and a grid for each row.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.peers.settings import PeersComparison


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            PeersComparison,
            argv,
            __doc__,
            "tarflow compare-peers",
            lambda config: check_writable(config.output, folder=True),
        )
        from tarflow.experiments.peers.comparison import compare_peers

        compare_peers(config)
    print((Path(config.output).expanduser() / "peers.md").read_text(encoding="utf-8"))
