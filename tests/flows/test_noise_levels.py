"""Flows that are told the level of the noise: the map, its density and its score at a level, in every kind of block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import condition_of, random_images, small_model
from torch import Tensor

from tarflow.flows import editing
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import Decoding, guided_states, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.denoising import score_denoise
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.level import level_features
from tarflow.flows.likelihood import flow_loss, log_prob, token_log_prob
from tarflow.flows.model import TARFlowModel

KINDS: dict[str, dict[str, Any]] = {
    "published": {
        "scale": "exp", "positions": "learned", "conditioning": "class_vectors", "start_token": False,
        "soft_clip": 0.0, "final_norm": False, "patch_layout": "channel_first", "first_order": "row_major",
    },
    "unconditional": {"positions": "rotary"},
    "captions": {"conditioning": "prefix", "condition_blocks": "deep"},
    "class_prefix": {"conditioning": "class_prefix", "positions": "rotary_1d"},
    "coupling": {"block": "coupling", "conditioning": "class_vectors", "layers_per_block": (1, 1, 1)},
    "inverse": {"block": "inverse_autoregressive", "conditioning": "class_vectors"},
}  # fmt: skip
AUTOREGRESSIVE = ("published", "unconditional", "captions", "class_prefix")


def leveled(kind: str, **changes: Any) -> TARFlowModel:
    torch.manual_seed(0)
    return small_model(noise_conditioning=True, **{**KINDS[kind], **changes}).double()


def given_of(model: TARFlowModel, batch: int, level: Tensor | float) -> dict[str, Any]:
    return {**condition_of(model, batch), "noise_level": level}


def conditions_of(model: TARFlowModel, batch: int, level: float) -> tuple[Any, Any]:
    """As blocks take them, and "no condition"."""
    given = condition_of(model, batch)
    null = None if "cond" not in given else torch.zeros_like(given["cond"])
    condition = model.condition(given.get("class_labels"), given.get("cond"), batch, level)
    return condition, model.condition(None, null, batch, level)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_at_a_level_is_inverted_and_has_the_jacobians_determinant(kind: str) -> None:
    model = leveled(kind)
    x, given = random_images(model, 1), given_of(model, 1, 0.2)
    z, log_det = model(x, **given)
    again, inverse_log_det = model.inverse(z, **given)
    assert (again - x).abs().max() < 1e-9
    assert (inverse_log_det - log_det).abs().max() < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, **given)[0], x, vectorize=True)
    sign, expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))
    assert sign == 1
    assert abs(float(expected - log_det[0])) < 1e-9
    other, _ = model(x, **{**given, "noise_level": 0.01})
    assert (other - z).abs().max() > 1e-5, "the level changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_has_its_own_level(kind: str) -> None:
    model = leveled(kind)
    x, given = random_images(model, 3), condition_of(model, 3)
    levels = torch.tensor([0.01, 0.3, 0.1], dtype=torch.float64)
    z, log_det = model(x, **given, noise_level=levels)
    column, _ = model(x, **given, noise_level=levels[:, None])
    assert torch.equal(column, z)
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in given.items()}
        alone, alone_log_det = model(x[i : i + 1], **own, noise_level=float(levels[i]))
        torch.testing.assert_close(z[i : i + 1], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_det[i : i + 1], alone_log_det, rtol=0, atol=1e-12)


def test_the_embedding_is_sines_then_cosines_of_the_logarithm() -> None:
    level, width = 0.07, 12
    found = level_features(torch.tensor([math.log(level)], dtype=torch.float64), width)[0].tolist()
    angles = [math.log(level) * 10000 ** (-i / 6) for i in range(6)]
    assert found == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=1e-12)


@pytest.mark.parametrize("blocks", ["all", "deep"])
@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_all_ways_to_decode_agree_at_a_level(kind: str, blocks: str) -> None:
    model = leveled(kind)
    z, (condition, null) = random_images(model, 3), conditions_of(model, 3, 0.2)
    for guidance in (None, Guidance(1.5, blocks=blocks), Guidance(1.0, "linear_scale", temperature=1.3, blocks=blocks)):
        exact, log_det = generate(model, z, condition, null, guidance)
        assert residual(model, exact, z, condition, null, guidance)[0].max() < 1e-9  # by one pass without a cache
        for decoding in (Decoding("jacobi", 1e-12), Decoding("gs_jacobi", 1e-12, 2)):
            found, _ = generate(model, z, condition, null, guidance, decoding=decoding)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
        found, fast_log_det = generate(model, z, condition, null, guidance, fast=FastSteps(None))
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
        torch.testing.assert_close(fast_log_det, log_det, rtol=0, atol=1e-9)


def test_static_steps_take_over_another_level() -> None:
    """What a CUDA graph was captured for one level serves the next: levels are in a buffer."""
    model, steps = leveled("published"), FastSteps(None)
    z = random_images(model, 2)
    for level in (0.3, 0.02):
        condition, _ = conditions_of(model, 2, level)
        found, _ = generate(model, z, condition, fast=steps)
        torch.testing.assert_close(found, generate(model, z, condition)[0], rtol=0, atol=1e-9)
    assert len(steps.steps) == len(model.blocks)


def test_guidance_of_the_deep_block_alone_leaves_the_others() -> None:
    model = leveled("published")
    x, (condition, null) = random_images(model, 2), conditions_of(model, 2, 0.2)
    plain = guided_states(model, x, condition)
    deep = guided_states(model, x, condition, null, Guidance(2.0, blocks="deep"))
    everywhere = guided_states(model, x, condition, null, Guidance(2.0))
    torch.testing.assert_close(deep[0], plain[0], rtol=0, atol=0)
    assert (deep[1] - plain[1]).abs().max() > 1e-4
    assert (everywhere[0] - plain[0]).abs().max() > 1e-4


def test_linear_guidance_of_the_scale_itself() -> None:
    torch.manual_seed(0)
    (shift, log_scale), (shift_u, log_scale_u) = (torch.randn(2, 3, 4, dtype=torch.float64) / 10 for _ in range(2))
    found = Guidance(1.5, "linear_scale")((shift, log_scale), (shift_u, log_scale_u), 1, 4)
    torch.testing.assert_close(found[0], shift + 1.5 * (shift - shift_u))
    torch.testing.assert_close(found[1].exp(), log_scale.exp() + 1.5 * (log_scale.exp() - log_scale_u.exp()))
    far = Guidance(9.0, "linear_scale")((shift, log_scale), (shift_u, log_scale + 5), 1, 4)[1]
    assert far.isfinite().all()  # where the line would go below 0
    only_shift = Guidance(1.5, "linear_scale", parts="b")((shift, log_scale), (shift_u, log_scale_u), 1, 4)
    torch.testing.assert_close(only_shift[1], log_scale)


def test_the_score_at_a_level_is_the_densitys_slope() -> None:
    model = leveled("published")
    y, given, level = random_images(model, 2), condition_of(model, 2), 0.3
    score = (score_denoise(model, y, level, **given) - y) / level**2
    direction, step = torch.randn_like(y), 1e-5
    ends = [log_prob(model, y + sign * step * direction, **given, noise_level=level) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((score * direction).flatten(1).sum(1), slope.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_likelihoods_by_token_and_fillings_are_at_the_level(kind: str) -> None:
    model = leveled(kind)
    x, given = random_images(model, 2), given_of(model, 2, 0.1)
    total = log_prob(model, x, **given)
    torch.testing.assert_close(token_log_prob(model, x, **given).flatten(1).sum(1), total, rtol=0, atol=1e-9)
    hole = torch.zeros(2, 2, 2, dtype=torch.bool)
    hole[:, 0] = True
    held = editing.HeldFlow(model, x, hole, **given)
    noise, log_det = held.forward(x)
    again, inverse_log_det = held.inverse(noise)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, log_det, rtol=0, atol=1e-9)
    torch.testing.assert_close(held.model_log_prob(x), total)


@pytest.mark.parametrize("unit", ["block", "layer", "reversible"])
def test_gradients_do_not_depend_on_what_is_computed_again(unit: str) -> None:
    model = leveled("coupling")
    x, given = random_images(model, 3), given_of(model, 3, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))

    def gradients() -> list[Tensor]:
        z, log_det = model(x, **given)
        return list(torch.autograd.grad(flow_loss(z, log_det, given["noise_level"]), list(model.parameters())))

    expected = gradients()
    model.set_checkpointing(unit)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    names = [name for name, _ in model.named_parameters()]
    assert all(grad.abs().max() > 0 for name, grad in zip(names, expected, strict=True) if "level_embed" in name)


def test_weights_of_pictures_in_the_loss() -> None:
    z, log_det = torch.randn(3, 2, 4, 4), torch.randn(3)
    torch.testing.assert_close(flow_loss(z, log_det, torch.ones(3)), flow_loss(z, log_det))
    own = [flow_loss(z[i : i + 1], log_det[i : i + 1]) for i in range(3)]
    weights = torch.tensor([0.1, 0.2, 0.6])
    torch.testing.assert_close(
        flow_loss(z, log_det, weights), sum(w * one for w, one in zip(weights, own, strict=True)) / 3
    )


def test_an_untrained_flow_is_the_identity_at_every_level() -> None:
    model = TARFlowModel(in_channels=2, sample_size=4, layers_per_block=(1, 1), width=64, noise_conditioning=True)
    x = random_images(model, 2)
    assert torch.equal(model(x, noise_level=0.3)[0], x)


def test_in_16_bits_the_level_is_embedded_too() -> None:
    model = leveled("published").to(torch.bfloat16)
    z, log_det = model(torch.randn(2, 2, 4, 4), torch.tensor([0, 1]), noise_level=0.3)
    assert z.dtype == log_det.dtype == torch.float32


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (None, "say by noise_level which its input has"),
        (0.0, "noise_level must be positive, got"),
        (-1.0, "noise_level must be positive, got"),
        (torch.tensor([0.1, math.nan]), "noise_level must be positive, got"),
        (torch.tensor([0.1, 0.2, 0.3]), "noise_level must be one number or 2"),
    ],
)
def test_a_wrong_level_is_an_error(level: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leveled("unconditional")(torch.zeros(2, 2, 4, 4, dtype=torch.float64), noise_level=level)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="knows the one noise level of its training"):
        small_model()(torch.zeros(1, 2, 4, 4), noise_level=0.1)
    with pytest.raises(ValueError, match="set learned_denoiser to 'none'"):
        small_model(noise_conditioning=True, learned_denoiser="unconditional")
    with pytest.raises(ValueError, match="'all' or 'deep', got 'last'"):
        Guidance(1.0, blocks="last")
    with pytest.raises(ValueError, match="an even width"):
        small_model(noise_conditioning=True, width=65, num_heads=1, head_dim=32)
