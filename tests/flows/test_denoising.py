"""The score step that removes the training noise."""

from __future__ import annotations

import pytest
import torch
from helpers import condition_of, random_images, small_model

from tarflow.flows.denoising import score_denoise
from tarflow.flows.likelihood import flow_loss, log_prob
from tarflow.flows.model import TARFlowModel


@pytest.mark.parametrize("conditioning", ["none", "class_vectors", "class_prefix", "prefix"])
@pytest.mark.parametrize("scale", ["softplus", "additive"])
def test_the_step_is_the_numerical_gradient(conditioning: str, scale: str) -> None:
    model = small_model(conditioning=conditioning, scale=scale).double()
    y, condition, noise_std = random_images(model, 2), condition_of(model, 2), 0.3
    gradient, h = torch.empty_like(y), 1e-5
    with torch.no_grad():
        for place in range(y[0].numel()):
            step = torch.zeros_like(y).flatten(1)
            step[:, place] = h
            step = step.view_as(y)
            slope = (log_prob(model, y + step, **condition) - log_prob(model, y - step, **condition)) / (2 * h)
            gradient.flatten(1)[:, place] = slope
    denoised = score_denoise(model, y, noise_std, **condition)
    torch.testing.assert_close(denoised, y + noise_std**2 * gradient, rtol=0, atol=1e-8)


def test_the_step_is_that_of_the_mean_loss() -> None:
    model = small_model(conditioning="class_prefix").double()
    y, condition = random_images(model, 3).requires_grad_(), condition_of(model, 3)
    (gradient,) = torch.autograd.grad(flow_loss(*model(y, **condition)), y)
    denoised = score_denoise(model, y, 0.2, **condition)
    torch.testing.assert_close(denoised, (y - 0.2**2 * y.numel() * gradient).detach())


def test_the_identity_flow_shrinks_by_the_variance() -> None:
    model = TARFlowModel(in_channels=2, sample_size=4, layers_per_block=(1, 1), width=64, head_dim=32).double()
    y = random_images(model, 2)
    torch.testing.assert_close(score_denoise(model, y, 0.5), y - 0.25 * y)


def test_gaussian_data_are_denoised_to_their_posterior_mean() -> None:
    """Data N(m, s²) with noise σ: the flow z = (y − m)/√(s² + σ²) is exact, and E[x | y] is known."""
    model = TARFlowModel(in_channels=1, sample_size=2, layers_per_block=(1,), width=32, head_dim=32, scale="exp")
    model, mean, std, noise_std = model.double(), 1.5, 0.8, 0.4
    variance = std**2 + noise_std**2
    with torch.no_grad():
        bias = model.blocks[0].proj_out.bias  # [raw scale; shift], both clipped softly
        bias.copy_(4 * torch.atanh(torch.tensor([0.5 * torch.tensor(variance).log().item(), mean]) / 4))
    y = 2 * random_images(model, 5)
    expected = (std**2 * y + noise_std**2 * mean) / variance
    torch.testing.assert_close(score_denoise(model, y, noise_std), expected, rtol=0, atol=1e-6)


def test_no_noise_changes_nothing_and_negative_noise_is_an_error() -> None:
    model = small_model()
    y = random_images(model, 2)
    assert torch.equal(score_denoise(model, y, 0.0), y)
    with pytest.raises(ValueError, match=r"0 or positive, got -0\.1"):
        score_denoise(model, y, -0.1)


def test_it_works_without_gradients_and_leaves_none() -> None:
    model = small_model()
    y = random_images(model, 2)
    with torch.no_grad():
        inside = score_denoise(model, y, 0.1)
    torch.testing.assert_close(inside, score_denoise(model, y, 0.1), rtol=0, atol=1e-6)
    assert not inside.requires_grad
    assert not y.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
