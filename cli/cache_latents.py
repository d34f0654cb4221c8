"""Encode pictures once, for training without the autoencoder.

    tarflow cache-latents --output CACHE --data.source folder --data.path pictures.zip \\
        --data.image_size 256 --vae.name stabilityai/sd-vae-ft-ema [--flip true]

Then train with --data.source latents --data.path CACHE. Run it again after an interruption: whole files are kept.
--text.kind pretrained --text.name NAME encodes the captions too; --aspect_ratios '["1:1", "4:3", "3:4"]' keeps
pictures of mixed sizes near their own shape. On several devices:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli cache-latents …
"""

from __future__ import annotations

from typing import Any

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.folders import check_folder_writable
from tarflow.training.latent_cache.config import CacheConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(CacheConfig, argv, __doc__, "tarflow cache-latents", check_places)
        from accelerate import PartialState

        from tarflow.training.latent_cache.caching import cache_latents

        manifest = cache_latents(config)
        if PartialState().is_main_process:
            print(report(config.output, manifest))


def check_places(config: CacheConfig) -> None:
    """Whether there is such an autoencoder, and a place to write to.

    Raises:
        ValueError: that names what is not there.
    """
    config.vae.check_place()
    check_folder_writable(config.output)


def report(output: str, manifest: dict[str, Any]) -> str:
    """What the cache holds, in words."""
    counts, size = manifest["pictures"], sum(shard["bytes"] for shard in manifest["shards"])
    return (
        f"{output} holds {counts['train']:,} training and {counts['validation']:,} validation pictures in "
        f"{len(manifest['shards'])} files of {size / 2**20:,.1f} MiB in all"
    )
