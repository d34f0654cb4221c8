"""Trajectory models in float64: the chain, the transporter, the exact likelihood, sampling, the score of the chain."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import COND_DIM, NUM_CLASSES, PREFIX_LENGTH, perturb
from torch.distributions import MultivariateNormal, Normal

from tarflow import TARFlowModel, TrajectoryFlowModel
from tarflow.flows.layers.guidance import Guidance, guide_gaussian
from tarflow.flows.trajectory.chain import (
    chain_entropy,
    chain_levels,
    default_shift,
    level_of,
    noise_covariance,
    states_up,
    white_step_down,
)
from tarflow.flows.trajectory.likelihood import step_log_probs, trajectory_log_prob
from tarflow.flows.trajectory.sampling import generate_trajectory, joint_score_denoise, predicted, transported


def small_trajectory(**changes):
    """A perturbed model of two blocks and a predictor on 2 × 4 × 4 numbers, four tokens of eight, in float64."""
    arguments = {
        "in_channels": 2,
        "sample_size": 4,
        "patch_size": 2,
        "layers_per_block": (1, 1, 2),
        "width": 64,
        "head_dim": 32,
        "num_classes": NUM_CLASSES,
        "cond_dim": COND_DIM,
        "steps": (1, 3),
    }
    return perturb(TrajectoryFlowModel(**{**arguments, **changes}).double(), 0.05).eval()


def chain_of(model, steps, batch=3, noise_std=0.3):
    """States (B, N, C, H, W) of random data and their levels."""
    levels = model.levels(steps, noise_std)
    x = torch.randn(batch, 2, 4, 4).double()
    rows = torch.tensor(levels).double().expand(batch, -1)
    return states_up(x, rows, torch.randn(batch, steps, 2, 4, 4).double()), levels, rows


def conditions(model, batch):
    if model.config.conditioning == "prefix":
        return model.condition(None, torch.randn(batch, PREFIX_LENGTH, COND_DIM).double(), batch)
    return model.condition(torch.arange(batch) if model.config.conditioning != "none" else None, None, batch)


def test_levels_fall_from_noise_to_the_noise_that_is_left():
    levels = chain_levels(4, level_of(0.3), default_shift(64))
    assert levels[0] == 1
    assert levels[-1] == pytest.approx(0.3 / 1.3)
    assert levels == sorted(levels, reverse=True)
    assert default_shift(256) == pytest.approx(math.exp(0.5))
    assert chain_levels(2, 0, 1.0) == pytest.approx([1, 0.5, 0])
    for steps, last, shift in ((0, 0.1, 1.0), (2, 1.0, 1.0), (2, -0.1, 1.0), (2, 0.1, 0.0)):
        with pytest.raises(ValueError, match="got"):
            chain_levels(steps, last, shift)


def test_the_chain_has_the_moments_that_its_formulas_say():
    """Of x₀ fixed at 2: mean (1 − t)·2 and covariance of the noise; x₁ is independent of all others."""
    levels, count = [1.0, 0.7, 0.4, 0.2], 200_000
    torch.manual_seed(0)
    x = (1 - 0.2) * 2 + 0.2 * torch.randn(count).double()
    rows = torch.tensor(levels).double().expand(count, -1)
    states = states_up(x, rows, torch.randn(count, 3).double())
    assert torch.allclose(states.mean(0), (1 - rows[0]) * 2, atol=0.01)
    assert torch.allclose(states.T.cov(), torch.tensor(noise_covariance(levels)).double(), atol=0.01)


def test_a_white_step_is_the_conditional_of_white_data():
    """x_s given x_t, from the joint covariance of (x_t, x_s) for standard normal x₀."""
    t, s = torch.tensor(0.8).double(), torch.tensor(0.5).double()
    noise = torch.tensor(noise_covariance([0.8, 0.5])).double()
    signal = torch.stack([1 - t, 1 - s])
    joint = noise + torch.outer(signal, signal)
    share, std = white_step_down(t, s)
    assert torch.allclose(share, joint[0, 1] / joint[0, 0])
    assert torch.allclose(std.square(), joint[1, 1] - joint[0, 1] ** 2 / joint[0, 0])
    share, std = white_step_down(torch.tensor(1.0), s)
    assert share == 0
    assert torch.allclose(std.double(), (0.25 + s.square()).sqrt())


@pytest.mark.parametrize("sees_levels", [False, True])
def test_the_transporter_is_inverted_and_its_log_det_is_that_of_its_jacobian(sees_levels):
    model = small_trajectory(transporter_levels=sees_levels)
    x, levels = torch.randn(2, 2, 4, 4).double(), torch.tensor([0.3, 0.9], dtype=torch.float64)
    u, log_det = model(x, levels)
    assert (transported(model, u, levels) - x).abs().max() < 1e-10
    moved = (model(x, 0.9)[0] - u).abs().flatten(1).amax(1)
    assert (moved[0] > 1e-4) == sees_levels
    assert moved[1] < 1e-12
    jacobian = torch.autograd.functional.jacobian(
        lambda one: model(one.view(1, 2, 4, 4), 0.3)[0].flatten(), x[0].flatten()
    )
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det[0])
    assert log_det[0].abs() > 1e-3  # or the test says nothing


@pytest.mark.parametrize(
    ("conditioning", "sees_levels"), [("none", False), ("class_vectors", False), ("prefix", False), ("prefix", True)]
)
def test_the_likelihood_is_the_product_of_its_steps(conditioning, sees_levels):
    """Against the definition, one state and one picture at a time, with the Gaussian and the Jacobian by hand."""
    model = small_trajectory(conditioning=conditioning, transporter_levels=sees_levels)
    states, levels, rows = chain_of(model, 3)
    condition = conditions(model, 3)
    found = trajectory_log_prob(model, states, rows, condition)
    for row in range(3):
        own = None if condition is None else condition[row : row + 1]
        total = Normal(0, 1).log_prob(states[row, 0]).sum()
        for place in range(3):
            u, _ = model(states[row : row + 1, place], levels[place])
            level, lower = (torch.tensor([levels[i]]).double() for i in (place, place + 1))
            mean, log_std = model.predict(u, level, lower, own)
            lower_u, log_det = model(states[row : row + 1, place + 1], levels[place + 1])
            total = total + Normal(mean, log_std.exp()).log_prob(lower_u).sum() + log_det[0]
        assert torch.allclose(found[row], total)
    pairs = [step_log_probs(model, states[:, i : i + 2], rows[:, i : i + 2], condition) for i in range(3)]
    assert torch.allclose(torch.cat(pairs, 1), step_log_probs(model, states, rows, condition))


def test_the_likelihood_of_one_step_integrates_to_one():
    """p(x_s | x_t) of a picture of one number, over a grid; so does the chain of one step, T = 1."""
    model = small_trajectory(in_channels=1, sample_size=1, patch_size=1, start_token=True)
    grid = torch.linspace(-12, 12, 4001).double()
    levels = torch.tensor(model.levels(1, 0.3)).double()
    first = torch.full_like(grid, 0.7)
    states = torch.stack([first, grid], dim=1)[..., None, None, None]
    density = step_log_probs(model, states, levels.expand(len(grid), -1)).exp()[:, 0]
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    whole = trajectory_log_prob(model, states, levels.expand(len(grid), -1)).exp()
    assert torch.trapezoid(whole, grid).item() == pytest.approx(Normal(0, 1).log_prob(first[0]).exp().item(), abs=1e-6)


def test_samples_have_the_moments_of_the_predictor_and_the_likelihood_knows_them():
    model, count = small_trajectory(in_channels=1, sample_size=2, patch_size=1), 4000
    levels = model.levels(1, 0.3)
    first = torch.randn(1, 1, 2, 2).double().expand(count, -1, -1, -1)
    noise = [first, torch.randn(count, 1, 2, 2).double()]
    states = generate_trajectory(model, noise, levels)
    u, _ = model(first[:1])
    level, lower = (torch.tensor([at]).double() for at in levels)
    mean, log_std = model.predict(u, level, lower)
    assert torch.allclose(states[1].mean(0), mean[0], atol=0.05)
    assert torch.allclose(states[1].std(0), log_std[0].exp(), rtol=0.05)
    # The density of what was drawn, by the drawn noise alone: N(ε)/σ·|det|, which the likelihood must find again.
    x = transported(model, states[1][:5], levels[1])
    expected = Normal(0, 1).log_prob(noise[1][:5]).flatten(1).sum(1) - log_std.sum() + model(x)[1]
    rows = torch.tensor(levels).double().expand(5, -1)
    assert torch.allclose(step_log_probs(model, torch.stack([first[:5], x], 1), rows)[:, 0], expected)


def test_an_untrained_model_is_right_for_white_data():
    """The chain of standard normal data is Gaussian; its likelihood and its denoising have closed forms."""
    model = TrajectoryFlowModel(in_channels=1, sample_size=2, layers_per_block=(1, 1, 1), width=64, steps=(3,)).double()
    levels = model.levels(3, 0.3)
    signal = 1 - torch.tensor(levels).double()
    covariance = torch.tensor(noise_covariance(levels)).double() + torch.outer(signal, signal)
    states = torch.randn(5, 4, 1, 2, 2).double()
    joint = MultivariateNormal(torch.zeros(4).double(), covariance)
    expected = joint.log_prob(states.flatten(2).transpose(1, 2)).sum(1)
    rows = torch.tensor(levels).double().expand(5, -1)
    assert torch.allclose(trajectory_log_prob(model, states, rows), expected)
    clean = torch.einsum("n,bnchw->bchw", torch.linalg.solve(covariance, signal), states)  # E[x₀ | the chain]
    assert torch.allclose(joint_score_denoise(model, states, levels), clean)


def test_the_entropy_of_a_chain_is_that_of_its_noise():
    levels = [1.0, 0.6, 0.3]
    covariance = torch.tensor(noise_covariance(levels)).double()
    rest = covariance[:2, :2] - torch.outer(covariance[:2, 2], covariance[2, :2]) / covariance[2, 2]
    assert chain_entropy(levels) == pytest.approx(MultivariateNormal(torch.zeros(2).double(), rest).entropy().item())


def test_guidance_is_the_closed_form_of_both_gaussians():
    model = small_trajectory(conditioning="class_vectors")
    u, labels = torch.randn(2, 2, 4, 4).double(), torch.tensor([0, 1])
    condition, null = model.condition(labels, None, 2), model.condition(None, None, 2)
    levels = (0.8, 0.5)
    level, lower = (torch.full((2,), at).double() for at in levels)
    expected = guide_gaussian(model.predict(u, level, lower, condition), model.predict(u, level, lower, null), 1.5)
    found = predicted(model, u, levels, condition, null, Guidance(1.5), 0, 2)
    assert torch.allclose(found[0], expected[0])
    assert torch.allclose(found[1], expected[1])
    plain = predicted(model, u, levels, condition, null, Guidance(0.0), 0, 2)
    assert (found[0] - plain[0]).abs().max() > 1e-4


@pytest.mark.parametrize("unit", ["block", "layer", "both"])
def test_gradients_are_the_same_with_checkpointing(unit):
    model = small_trajectory()
    states, _, rows = chain_of(model, 3)
    gradients = []
    for one in ("none", unit):
        model.set_checkpointing(one)
        model.zero_grad()
        step_log_probs(model, states, rows).sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"layers_per_block": (2,)}, r"layers_per_block .*\[2\]"),
        ({"layers_per_block": (0, 2)}, r"layers_per_block .*\[0, 2\]"),
        ({"scale": "additive"}, "additive"),
        ({"steps": ()}, r"steps .*\[\]"),
        ({"steps": (4, 0)}, r"steps .*\[4, 0\]"),
        ({"steps": (4, 4)}, r"steps .*\[4, 4\]"),
        ({"shift": 0.0}, "shift must be positive and finite, got 0"),
        ({"shift": math.inf}, "shift must be positive and finite, got inf"),
    ],
)
def test_settings_that_cannot_be(settings, told):
    with pytest.raises(ValueError, match=told):
        TrajectoryFlowModel(**{"width": 64, **settings})


def test_numbers_of_steps_that_it_does_not_know():
    with pytest.raises(ValueError, match="trained with 1, 3 steps, and cannot draw in 2"):
        small_trajectory().levels(2, 0.3)


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ([1.0, 0.2, 0.5], r"must fall, from 1 at most to 0 at least, got \[1.0, 0.2, 0.5\]"),
        ([1.0, 0.5, 0.5], "must fall"),
        ([1.5, 0.5, 0.2], "must fall"),
        ([1.0, 0.5, -0.5], "must fall"),
        ([0.75, 0.5, 0.25], r"begins at the level 1, which is noise alone, got \[0.75, 0.5, 0.25\]"),
        ([1.0], "at least 1 step"),
        ([1.0, 0.25], "3.* as many levels|2 levels needs as many draws"),
    ],
)
def test_levels_that_no_chain_has(levels, told):
    model, noise = small_trajectory(), torch.randn(3, 1, 2, 4, 4).double()
    rows = torch.tensor([levels], dtype=torch.float64)
    for call in (
        lambda: generate_trajectory(model, list(noise), levels),
        lambda: trajectory_log_prob(model, noise.transpose(0, 1)[:, : 1 if len(levels) == 1 else None], rows),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    if told == "must fall" and levels != [1.0, 0.5, 0.5]:
        with pytest.raises(ValueError, match=told):
            states_up(noise[0], rows, noise[1:].transpose(0, 1))


def test_a_transporter_that_sees_levels_needs_them():
    model = small_trajectory(transporter_levels=True)
    x = torch.randn(1, 2, 4, 4).double()
    with pytest.raises(ValueError, match="say by noise_level which"):
        model(x)
    with pytest.raises(ValueError, match="must be positive, got"):
        model(x, 0.0)


def test_arguments_that_both_kinds_of_models_have_mean_the_same():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (TrajectoryFlowModel, TARFlowModel))
    shared = {name for name in ours if name in theirs} - {"layers_per_block"}  # one block less, and the predictor
    assert len(shared) > 20
    assert {name: ours[name].default for name in shared} == {name: theirs[name].default for name in shared}


def test_small_embeddings_of_levels_keep_their_precision_under_layerwise_casting() -> None:
    model = TrajectoryFlowModel(
        in_channels=1, sample_size=4, layers_per_block=(1, 1, 1), width=64, transporter_levels=True
    )
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = {name: part.dtype for name, part in model.named_parameters() if "level" in name}
    assert {name.split(".")[0] for name in found} == {"blocks", "predictor"}
    assert set(found.values()) == {torch.float32}
