"""Densities."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import condition_of, perturb, random_images, small_model

from tarflow.flows.likelihood import flow_loss, log_prob, nats_per_dim, prior_log_prob, token_log_prob
from tarflow.flows.model import TARFlowModel


def test_prior_is_the_normal_distribution() -> None:
    z, variance = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.rand(2, 4, 4, dtype=torch.float64) + 0.5
    unit = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2, 3))
    torch.testing.assert_close(prior_log_prob(z), unit)
    scaled = torch.distributions.Normal(0, variance.sqrt()).log_prob(z).sum((1, 2, 3))
    torch.testing.assert_close(prior_log_prob(z, variance), scaled)
    assert prior_log_prob(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("scale", ["exp", "softplus", "additive"])
def test_the_density_integrates_to_one(scale: str) -> None:
    model = TARFlowModel(in_channels=1, sample_size=2, layers_per_block=(1, 1), width=32, head_dim=32, scale=scale)
    perturb(model, 0.05).double()
    line = torch.linspace(-9, 9, 181, dtype=torch.float64)
    points = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    with torch.no_grad():
        density = torch.cat([log_prob(model, part).exp() for part in points.split(4096)])
    assert (density - prior_log_prob(points).exp()).abs().max() > 1e-3, "the model is the identity"
    assert density.sum() * (line[1] - line[0]) ** 2 == pytest.approx(1.0, abs=1e-6)


def test_loss_is_nats_per_dim_without_the_constant() -> None:
    model = small_model(conditioning="class_prefix").double()
    x, condition = random_images(model, 3), condition_of(model, 3)
    dims = x[0].numel()
    nats = nats_per_dim(log_prob(model, x, **condition), dims)
    assert nats.shape == (3,)
    torch.testing.assert_close(flow_loss(*model(x, **condition)), nats.mean() - 0.5 * math.log(2 * math.pi))


def test_the_learned_prior_is_in_the_density_but_not_in_the_loss() -> None:
    model = small_model(scale="additive", learned_prior=True, positions="learned").double()
    x = random_images(model, 3)
    z, log_det = model(x)
    before = flow_loss(z, log_det)
    model.update_prior(2 * z)
    variance = model.prior_variance_image()
    assert (variance - 1).abs().max() > 0.1
    expected = torch.distributions.Normal(0, variance.sqrt()).log_prob(z).sum((1, 2, 3)) + log_det
    torch.testing.assert_close(log_prob(model, x), expected)
    torch.testing.assert_close(flow_loss(*model(x)), before)


def test_a_learned_prior_is_of_one_size() -> None:
    model = small_model(learned_prior=True)
    shape = (model.config.in_channels, 4, 4)
    other = torch.randn(2, shape[0], 8, 8)
    for measure in (log_prob, token_log_prob, lambda model, x: model.scale_noise(x)):
        with pytest.raises(ValueError, match=r"learned its prior for samples \(\d, 4, 4\), got \(\d, 8, 8\)"):
            measure(model, other)
    assert log_prob(model, torch.randn(2, *shape)).shape == (2,)
