"""An inverse autoregressive student learns to draw what its teacher draws."""

from __future__ import annotations

import pytest
import torch
from helpers import perturb, random_images, small_model

from tarflow.flows.distillation import distillation_loss, sample_divergence
from tarflow.flows.model import TARFlowModel

SMALL = {"in_channels": 1, "sample_size": 2, "patch_size": 1, "layers_per_block": (1, 1), "width": 32, "head_dim": 16}


def pair() -> tuple[TARFlowModel, TARFlowModel]:
    """A teacher that is far from the identity, and an untrained student."""
    teacher = perturb(TARFlowModel(**SMALL), 0.2).eval()
    return teacher, TARFlowModel(**SMALL, block="inverse_autoregressive")


def test_identities_are_each_others_students() -> None:
    teacher, student = TARFlowModel(**SMALL), TARFlowModel(**SMALL, block="inverse_autoregressive")
    x = random_images(teacher, 8)
    assert distillation_loss(teacher, student, x) < 1e-12
    assert sample_divergence(teacher, student, x).abs().max() < 1e-5


def test_the_student_comes_close_to_its_teacher() -> None:
    teacher, student = pair()
    z = torch.randn(256, 1, 2, 2)
    x, _ = teacher.inverse(z)
    start, divergence = distillation_loss(teacher, student, x).detach(), sample_divergence(teacher, student, z).mean()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = distillation_loss(teacher, student, x)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * start
    assert sample_divergence(teacher, student, z).mean() < 0.2 * divergence
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert (student.inverse(z)[0] - x).pow(2).mean() < 0.2 * (z - x).pow(2).mean()


def test_pairs_that_do_not_fit() -> None:
    teacher, _ = pair()
    x = random_images(teacher, 2)
    with pytest.raises(ValueError, match="its student 'inverse_autoregressive', got"):
        distillation_loss(teacher, teacher, x)
    other = TARFlowModel(**SMALL, block="inverse_autoregressive", first_order="row_major")
    with pytest.raises(ValueError, match="the same blocks in the same orders"):
        distillation_loss(teacher, other, x)
    with pytest.raises(ValueError, match="the same blocks in the same orders"):
        distillation_loss(teacher, small_model(block="inverse_autoregressive", layers_per_block=(1, 1, 1)), x)
