"""Pictures, and what a pipeline's autoencoder makes of them: the floor of any distance that its samples can reach."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.io import write_png

from tarflow.common.files import check_writable
from tarflow.common.progress import progress_bar
from tarflow.data.images import collate, to_model, to_uint8
from tarflow.data.stream.first import open_pictures
from tarflow.data.subset import check_not_empty, evenly
from tarflow.evaluation.reconstruction.quality import psnr
from tarflow.evaluation.reconstruction.settings import ReconstructConfig
from tarflow.pipeline.opening import open_pipeline


@torch.no_grad()
def reconstruct(config: ReconstructConfig) -> tuple[int, float]:
    """Write originals and reconstructions; returns their number and the mean PSNR in dB of 8-bit pictures.

    Raises:
        ValueError: if the pipeline has no autoencoder, the split no pictures or no end, or the folder has some already.
    """
    folders = {name: Path(config.out).expanduser() / name for name in ("original", "reconstructed")}
    if any(folder.is_dir() and any(folder.iterdir()) for folder in folders.values()):
        raise ValueError(
            f"{config.out!r} holds pictures already, which would be mixed: remove them or give another --out"
        )
    check_writable(config.out, folder=True)
    pipe = open_pipeline(config.pipeline)
    if pipe.vae is None:
        raise ValueError(f"the pipeline {config.pipeline!r} models pixels: it has no autoencoder")
    images = open_pictures(config.data, config.split, config.num, "num")
    count = len(images) if config.num is None else min(config.num, len(images))
    check_not_empty(count, config.split)
    chosen = evenly(len(images), count)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    ratios = []
    for first in progress_bar(range(0, count, config.batch_size), unit="batch"):
        original = collate([images[place] for place in chosen[first : first + config.batch_size]])["image"]
        latents = pipe.codec.encode(to_model(original.to(pipe.device)))
        reconstructed = to_uint8(pipe.codec.decode(latents)).cpu()
        ratios.append(psnr(reconstructed, original))
        for name, pictures in (("original", original), ("reconstructed", reconstructed)):
            for place, picture in enumerate(pictures, start=first):
                write_png(picture, str(folders[name] / f"{place:08d}.png"))
    return count, float(torch.cat(ratios).mean())
