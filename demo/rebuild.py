"""One picture through the autoencoder and the flow, and back: what is lost where, and how likely it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow.data.config import DataConfig
from tarflow.data.folder import flattened, read_image, read_size
from tarflow.data.images import fit, to_model, to_uint8
from tarflow.evaluation.likelihood.held_out import picture_likelihoods
from tarflow.evaluation.reconstruction.quality import psnr
from tarflow.pipeline.conditions import condition_of
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

#: Larger uploads are refused before they are decoded: 40 million pixels are 120 MB.
MOST_PIXELS = 40_000_000
#: Of noise for the likelihood of a picture.
DRAWS = 4


@dataclass(frozen=True)
class Rebuilt:
    """What became of a picture.

    Attributes:
        fitted: the picture as the model sees it.
        reconstruction: by the autoencoder alone; None for models of pixels.
        round_trip: latents → z → latents → picture.
        noise: z, as a picture.
        psnr: of the reconstruction in dB; None without an autoencoder.
        error: largest |x − x'| of the flow's round trip, of latents of about unit size or pixels in [−1, 1].
        quantity: one of `tarflow.evaluation.likelihood.held_out.UNITS`.
        likelihood: under the given caption or class; None if there is none.
        likelihood_alone: under no condition.
    """

    fitted: Image.Image
    reconstruction: Image.Image | None
    round_trip: Image.Image
    noise: Image.Image
    psnr: float | None
    error: float
    quantity: str
    likelihood: float | None
    likelihood_alone: float


class OnePicture:
    """A data set of one picture, uint8 (3, S, S), as the likelihood's functions read one."""

    split = "upload"
    class_names: tuple[str, ...] | None = None  # its label is one of the model's

    def __init__(self, image: Tensor, caption: str | None, label: int | None):
        self.config = DataConfig(image_size=image.shape[-1])
        self.item: dict[str, Any] = {"image": image, "skipped": []}
        if caption is not None:
            self.item["caption"] = caption
        if label is not None:
            self.item["label"] = label

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item


def read_upload(path: str | None) -> Image.Image:
    """An uploaded file as an upright RGB picture, transparency on white.

    Raises:
        ValueError: if there is none, it is no picture, or it is too large; one sentence for the page.
    """
    if not path:
        raise ValueError("Choose a picture first.")
    file = Path(path)
    height, width = read_size(lambda: file.open("rb"), file.name)
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"The picture has {width:,} × {height:,} pixels, {height * width / 1e6:.0f} million; at most "
            f"{MOST_PIXELS // 10**6} million are taken: make it smaller first."
        )
    return flattened(read_image(file.read_bytes, file.name), (255, 255, 255))


@torch.no_grad()
def rebuild(pipe: TARFlowPipeline, image: Image.Image, caption: str | None = None, label: int | None = None) -> Rebuilt:
    """Encode a picture and decode it again.

    Args:
        pipe: a `TARFlowPipeline`.
        image: RGB, of any size; fitted to the model's.
        caption, label: what the flow is told; None is no condition.

    Raises:
        ValueError: if the model has no pictures of three channels.
    """
    side = pipe.flow.config.sample_size * pipe.codec.factor
    fitted = fit(image, side, side)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()  # (3, S, S)
    data = OnePicture(pixels, caption, label)
    conditional = caption is not None or label is not None

    # First, as it tells whether pictures fit the model at all.
    quantity, alone, _ = picture_likelihoods(pipe, data, draws=DRAWS, with_condition=False)
    given = picture_likelihoods(pipe, data, draws=DRAWS, with_condition=True)[1] if conditional else None

    batch = {"caption": [caption]} if label is None else {"label": torch.tensor([label])}
    condition = condition_of(pipe, batch, 1, conditional)
    latents = pipe.codec.encode(to_model(pixels[None].to(pipe.flow.device))).float()  # (1, C, h, w)
    z, _ = pipe.flow(latents, **condition)
    back, _ = pipe.flow.inverse(z, **condition)
    reconstruction = None if pipe.vae is None else to_uint8(pipe.decode_latents(latents))[0].cpu()
    return Rebuilt(
        fitted,
        None if reconstruction is None else picture(reconstruction),
        picture(to_uint8(pipe.decode_latents(back))[0]),
        noise_picture(z[0]),
        None if reconstruction is None else float(psnr(reconstruction[None], pixels[None])),
        float((back - latents).abs().max()),
        quantity,
        None if given is None else float(given.mean()),
        float(alone.mean()),
    )


def picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def noise_picture(z: Tensor) -> Image.Image:
    """z (C, H, W) with −3 to 3 as black to white: three channels as colours, others side by side in two rows or more."""
    grey = ((z.float().cpu() / 6 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    if len(grey) == 3:
        return picture(grey)
    rows = max(row for row in range(1, math.isqrt(len(grey)) + 1) if len(grey) % row == 0)
    tiles = grey.unflatten(0, (rows, -1))  # (rows, columns, H, W)
    return Image.fromarray(tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).contiguous().numpy())
