"""How near pictures are to their originals: PSNR and SSIM, of 8-bit pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Equal pictures, whose ratio is infinite, count as if their mean squared error were 0.01: 68.1 dB.
LARGEST_PSNR = 10 * math.log10(255**2 / 0.01)
#: Side of SSIM's window.
WINDOW = 11


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B,); both are uint8 (B, 3, H, W)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # imported here: it takes a second

    check_pictures(pictures, originals)
    ratios = peak_signal_noise_ratio(
        pictures.float(), originals.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return ratios.clamp(max=LARGEST_PSNR)


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,), 1 for equal ones; both are uint8 (B, 3, H, W), of at least 11 × 11
    pixels. Gaussian windows of 11 × 11, standard deviation 1.5, as Wang et al. (2004) have it, by colour. In float32: in
    even areas it is right to 3e-4."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_pictures(pictures, originals)
    if min(pictures.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} × {WINDOW} pixels, got {tuple(pictures.shape[2:])}")
    return structural_similarity_index_measure(
        pictures.float(), originals.float(), data_range=255.0, sigma=1.5, kernel_size=WINDOW, reduction="none"
    )


def check_pictures(pictures: Tensor, originals: Tensor) -> None:
    """An error unless both are 8-bit pictures of one shape."""
    for images in (pictures, originals):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"expected uint8 pictures (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if pictures.shape != originals.shape:
        raise ValueError(f"pictures {tuple(pictures.shape)} and originals {tuple(originals.shape)} differ in shape")
