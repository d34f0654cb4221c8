"""Encode pictures once, for training without the autoencoder.

    accelerate launch -m tarflow.scripts.cache_latents --output CACHE --data.source folder --data.path pictures.zip \\
        --data.image_size 256 --vae.name stabilityai/sd-vae-ft-ema [--flip true]

Then train with ``--data.source latents --data.path CACHE``. Plain ``python -m tarflow.scripts.cache_latents`` works
too, on one device. Run it again after an interruption: whole files are kept. ``--text.kind pretrained --text.name
NAME`` encodes the captions too; ``--aspect_ratios '["1:1", "4:3", "3:4"]'`` keeps pictures of mixed sizes near their
own shape.
"""

from __future__ import annotations

from accelerate import PartialState

from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.latent_cache.plan import CacheConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = parse_dataclass(CacheConfig, argv, __doc__)
        manifest = cache_latents(config)
        if PartialState().is_main_process:
            print(report(config.output, manifest))


def report(output: str, manifest: dict) -> str:
    """What the cache holds, in words."""
    counts, size = manifest["pictures"], sum(shard["bytes"] for shard in manifest["shards"])
    return (
        f"{output} holds {counts['train']:,} training and {counts['validation']:,} validation pictures in "
        f"{len(manifest['shards'])} files of {size / 2**20:,.1f} MiB in all"
    )


if __name__ == "__main__":
    main()
