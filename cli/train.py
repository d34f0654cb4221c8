"""Train a latent normalizing flow on pictures.

    tarflow train --config quickstart_text --output runs/mine
    tarflow train --config my.yaml --train.steps 1000 --resume latest

--config takes a YAML file, or the bare name of a shipped configuration. Every key of the file can be given on the
command line, which counts more. The folder --output gets logs, checkpoints, and a folder `pipeline` that
`tarflow generate` draws from; --resume latest goes on from the last checkpoint. To train on several devices:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli train --config …
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.pipeline.loading.place import locate
from tarflow.training.flow.config import RunConfig


def main(
    argv: list[str] | None = None, prog: str = "tarflow train", description: str | None = __doc__
) -> dict[str, float]:
    """Train; errors end as `ending` says.

    Args:
        argv: the settings; None takes those of the command line.
        prog, description: how the help calls this, and what it says of it.

    Returns:
        the run's last metrics.
    """
    with ending():
        config, resolved = read_settings(RunConfig, argv, description, prog, check_places)
        from tarflow.training.flow.arguments import check_flow_keys
        from tarflow.training.flow.trainer import flow_trainer
        from tarflow.training.loop.stopping import exit_status, launched_process

        check_flow_keys(config.flow)
    with launched_process(), ending():
        metrics = flow_trainer(config, resolved).run()
        if status := exit_status(metrics):
            raise SystemExit(status)
        return metrics


def check_places(config: RunConfig) -> None:
    """Whether there is an autoencoder of this name, if the data are no cache of latents, which has its own, and what else is
    named, before libraries are loaded and the Hub is asked."""
    if config.data.source != "latents":
        config.vae.check_place()
    if config.init_from is not None:
        locate(config.init_from)
    config.text.check_place()
