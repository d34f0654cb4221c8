"""PSNR and SSIM of 8-bit pictures."""

from __future__ import annotations

import math

import pytest
import torch

from tarflow.evaluation.reconstruction.quality import LARGEST_PSNR, psnr, ssim


def pictures(count: int, side: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def test_psnr_of_known_errors() -> None:
    originals = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    changed = originals.clone()
    changed[0] += 10  # mean squared error 100
    changed[1, 0, 0, 0] += 16  # 256 / 192
    expected = [10 * math.log10(255**2 / 100), 10 * math.log10(255**2 / (256 / 192)), LARGEST_PSNR]
    torch.testing.assert_close(psnr(changed, originals), torch.tensor(expected))


def test_ssim_of_known_pictures() -> None:
    originals = pictures(3)
    assert ssim(originals, originals).tolist() == pytest.approx([1, 1, 1])
    # Two even pictures have no structure: what is left is (2ab + c) / (a² + b² + c) with c = (0.01 · 255)².
    a, b = 100, 150
    even = torch.full((1, 3, 16, 16), a, dtype=torch.uint8)
    constant = (0.01 * 255) ** 2
    expected = (2 * a * b + constant) / (a * a + b * b + constant)
    assert ssim(even, torch.full_like(even, b)).tolist() == pytest.approx([expected], abs=3e-4)


def test_each_picture_counts_by_itself() -> None:
    originals, others = pictures(4), pictures(4)
    for measure in (psnr, ssim):
        alone = torch.cat([measure(others[i : i + 1], originals[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(measure(others, originals), alone)
        assert alone.unique().numel() == 4


def test_unfit_pictures() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="expected uint8 pictures"):
            measure(pictures(1).float(), pictures(1))
        with pytest.raises(ValueError, match="differ in shape"):
            measure(pictures(1), pictures(2))
    with pytest.raises(ValueError, match="at least 11 × 11"):
        ssim(pictures(1, side=10), pictures(1, side=10))
