"""Fréchet distance between two Gaussians, from their means and covariances (Heusel et al., 2017, arXiv:1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|μ_a − μ_b|² + tr(A) + tr(B) − 2 tr((A B)^½), in float64.

    tr((A B)^½) is the sum of the singular values of A^½ B^½, whose squares are the eigenvalues of A^½ B A^½. Unlike the
    square root of the product A B, which is not symmetric, nothing here turns complex where covariances are singular,
    and errors of rounding stay of the size of the rounding.

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D), symmetric and positive semidefinite up to rounding.

    Raises:
        ValueError: if the shapes do not fit, or a number is not finite.
    """
    dims = mean_a.numel()
    shapes = [tuple(tensor.shape) for tensor in (mean_a, cov_a, mean_b, cov_b)]
    if shapes != [(dims,), (dims, dims)] * 2:
        raise ValueError(f"expected means (D,) and covariances (D, D) of the same D, got the shapes {shapes}")
    mean_a, cov_a, mean_b, cov_b = (tensor.double() for tensor in (mean_a, cov_a, mean_b, cov_b))
    if not all(bool(tensor.isfinite().all()) for tensor in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("a mean or covariance is not finite, so the Fréchet distance is not defined")
    cross = torch.linalg.svdvals(symmetric_root(cov_a) @ symmetric_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # equal moments give a zero that rounding may turn negative


def symmetric_root(matrix: Tensor) -> Tensor:
    """The positive semidefinite square root of a symmetric matrix (D, D); eigenvalues below zero count as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def bias_warning(count: int, dims: int) -> str | None:
    """A sentence if the moments of ``count`` pictures cannot stand for a Gaussian of ``dims`` dimensions, else None."""
    if count > dims:
        return None
    return (
        f"{count} pictures are too few for {dims} features: their covariance is singular, and the Fréchet distance is "
        "biased upwards; take more pictures, or compare only at equal numbers of them"
    )
