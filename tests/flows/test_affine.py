"""The affine map and its scales."""

from __future__ import annotations

import math

import pytest
import torch

from tarflow.flows.layers.affine import (
    SCALES,
    affine_forward,
    affine_inverse,
    at_least_float32,
    log_scale_of,
    soft_clip,
)


@pytest.mark.parametrize("scale", SCALES)
def test_a_raw_zero_is_scale_one(scale: str) -> None:
    log_scale = log_scale_of(torch.zeros(3, dtype=torch.float64), scale)
    torch.testing.assert_close(log_scale, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_scales_are_their_formulas() -> None:
    raw = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(log_scale_of(raw, "exp").exp(), raw.exp())
    softplus = torch.tensor([math.log(math.log1p(math.exp(r + 0.541324854612918))) for r in raw.tolist()]).double()
    torch.testing.assert_close(log_scale_of(raw, "softplus"), softplus, rtol=1e-6, atol=1e-6)
    assert torch.equal(log_scale_of(raw, "additive"), torch.zeros_like(raw))
    with pytest.raises(ValueError, match="exp, softplus, additive, got 'tanh'"):
        log_scale_of(raw, "tanh")


def test_forward_and_inverse_undo_each_other() -> None:
    x, shift, log_scale = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    z, log_det = affine_forward(x, shift, log_scale)
    torch.testing.assert_close(z, (x - shift) / log_scale.exp())
    torch.testing.assert_close(log_det, -log_scale.sum((1, 2)))
    torch.testing.assert_close(affine_inverse(z, shift, log_scale), x)


def test_log_det_is_the_jacobians() -> None:
    x, shift, log_scale = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda x: affine_forward(x, shift, log_scale)[0], x).reshape(6, 6)
    torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], affine_forward(x, shift, log_scale)[1][0])


def test_at_least_float32() -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        x = torch.ones(1, 1, 1, dtype=dtype)
        assert at_least_float32(x).dtype == expected
        assert log_scale_of(x, "softplus").dtype == expected
        z, log_det = affine_forward(x, at_least_float32(x), at_least_float32(x))
        assert z.dtype == log_det.dtype == affine_inverse(x, z, z).dtype == expected


def test_soft_clip() -> None:
    x = torch.linspace(-100, 100, 201, dtype=torch.float64)
    clipped = soft_clip(x, 4.0)
    assert clipped.abs().max() <= 4
    assert (clipped.diff() >= 0).all()
    torch.testing.assert_close(clipped, 4 * torch.tanh(x / 4))
    small = torch.linspace(-1e-3, 1e-3, 11, dtype=torch.float64)
    torch.testing.assert_close(soft_clip(small, 4.0), small, rtol=1e-6, atol=0)
    assert soft_clip(x, 0.0) is x
