"""Sequential decoding against decoding without a cache, with and without guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flow_kinds import GUIDANCES, MODELS, conditions
from helpers import block_parameters, random_images, small_model
from torch import Tensor

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.decoding.method import Decoding
from tarflow.flows.decoding.sampling import decode, generate
from tarflow.flows.layers.guidance import Guidance, guide_gaussian, guide_linear
from tarflow.flows.layers.kv_cache import KVCache
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.model import TARFlowModel

GRID = (2, 2)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> TARFlowModel:
    return small_model(**MODELS[request.param]).double()


@torch.no_grad()
def decode_naively(
    block: FlowBlock, z: Tensor, cond: Tensor | None, null: Tensor | None, guidance: Guidance | None
) -> tuple[Tensor, Tensor]:
    """Invert a block by running the whole sequence, without a cache, once for each token."""
    order = block.config.order
    z = reorder(z, order, GRID)
    x, tokens = torch.zeros_like(z), z.shape[1]
    scales = torch.ones_like(z)
    for token in range(tokens):
        shift, scale = (part[:, token] for part in block_parameters(block, x, GRID, cond))
        acts = guidance is not None and (block.sees_condition or guidance.temperature != 1)
        if acts and (token > 0 or block.start_token is not None):
            unconditional = block_parameters(block, x, GRID, null, guidance.temperature)
            shift_u, scale_u = (part[:, token] for part in unconditional)
            shift, scale = guided_by_definition(guidance, shift, scale, shift_u, scale_u, token, tokens)
        x[:, token], scales[:, token] = z[:, token] * scale + shift, scale
    return restore(x, order, GRID), -scales.log().sum((1, 2))


def guided_by_definition(
    guidance: Guidance, shift: Tensor, scale: Tensor, shift_u: Tensor, scale_u: Tensor, token: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """The guided shift and scale, number by number as the formulas are written."""
    new_shift, new_scale = shift.clone(), scale.clone()
    for i in range(shift.numel()):
        mu, sigma = float(shift.flatten()[i]), float(scale.flatten()[i])
        mu_u, sigma_u = float(shift_u.flatten()[i]), float(scale_u.flatten()[i])
        w = guidance.weight
        if guidance.method == "gaussian":
            s = min(1.0, sigma / sigma_u) ** 2
            result = (((1 + w) * mu - w * s * mu_u) / (1 + w - w * s), sigma / math.sqrt(1 + w - w * s))
        else:
            g = w * (token - 1 + 1) / (tokens - 1) if guidance.annealed else w
            a, b = math.log(sigma), mu
            if guidance.parts in ("a", "ab"):
                a = a + g * (a - math.log(sigma_u))
            if guidance.parts in ("b", "ab"):
                b = b + g * (b - mu_u)
            result = (b, math.exp(a))
        new_shift.view(-1)[i], new_scale.view(-1)[i] = result
    return new_shift, new_scale


@pytest.mark.parametrize("name", GUIDANCES)
def test_cached_decoding_is_decoding_without_a_cache(model: TARFlowModel, name: str) -> None:
    guidance = GUIDANCES[name]
    cond, null = conditions(model, 2)
    z, _ = model.patchify(random_images(model, 2))
    for block in model.blocks:
        x, log_det = decode(block, z, GRID, cond, null, guidance)
        expected, expected_log_det = decode_naively(block, z, cond, null, guidance)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det, expected_log_det, rtol=0, atol=1e-10)


def test_the_fixed_point_is_the_same(model: TARFlowModel) -> None:
    cond, _ = conditions(model, 2)
    z, _ = model.patchify(random_images(model, 2))
    for block in model.blocks:
        order = block.config.order
        target = x = reorder(z, order, GRID)
        for _ in range(z.shape[1]):
            shift, scale = block_parameters(block, x, GRID, cond)
            x = target * scale + shift
        decoded, _ = block.inverse(z, GRID, cond)
        torch.testing.assert_close(decoded, restore(x, order, GRID), rtol=0, atol=1e-12)


def test_all_blocks_are_inverted_in_turn(model: TARFlowModel) -> None:
    guidance = Guidance(0.7)
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    tokens, _ = model.patchify(z)
    total = 0.0
    for block in reversed(model.blocks):
        tokens, log_det = decode_naively(block, tokens, cond, null, guidance)
        total = total + log_det
    x, log_det = generate(model, z, cond, null, guidance)
    torch.testing.assert_close(x, model.unpatchify(tokens, GRID), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, total * torch.ones_like(log_det), rtol=0, atol=1e-10)


def test_the_noise_is_not_changed(model: TARFlowModel) -> None:
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    before = z.clone()
    generate(model, z, cond, null, Guidance(1.0))
    assert torch.equal(z, before)


def test_guidance_weight_zero_is_none(model: TARFlowModel) -> None:
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    plain, log_det = generate(model, z, cond)
    for guidance in (Guidance(0.0), Guidance(0.0, "linear"), Guidance(0.0, temperature=2.0)):
        for result in (generate(model, z, cond, null, guidance), generate(model, z, cond, None, guidance)):
            torch.testing.assert_close(result[0], plain, rtol=0, atol=1e-10)
            torch.testing.assert_close(result[1], log_det, rtol=0, atol=1e-10)


def test_guidance_changes_samples_of_conditional_models_only(model: TARFlowModel) -> None:
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    plain, _ = generate(model, z, cond)
    guided, _ = generate(model, z, cond, null, Guidance(2.0))
    if model.config.conditioning == "none":
        torch.testing.assert_close(guided, plain, rtol=0, atol=1e-10)
    else:
        assert (guided - plain).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_guidance_leaves_blocks_that_do_not_see_the_condition(method: str) -> None:
    model = small_model(**MODELS["deep-prefix"]).double()
    cond, null = conditions(model, 2)
    z, _ = model.patchify(random_images(model, 2))
    shallow, deep = model.blocks
    for block, changes in ((shallow, False), (deep, True)):
        plain, _ = decode(block, z, GRID, cond)
        guided, _ = decode(block, z, GRID, cond, null, Guidance(2.0, method))
        assert torch.allclose(plain, guided, rtol=0, atol=1e-10) != changes


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_temperature_one_is_ordinary_guidance(model: TARFlowModel, method: str) -> None:
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    ordinary, _ = generate(model, z, cond, null, Guidance(1.5, method))
    with_one, _ = generate(model, z, cond, null, Guidance(1.5, method, temperature=1.0))
    almost_one, _ = generate(model, z, cond, null, Guidance(1.5, method, temperature=1.0 + 1e-9))
    other, _ = generate(model, z, cond, null, Guidance(1.5, method, temperature=2.0))
    torch.testing.assert_close(ordinary, with_one, rtol=0, atol=1e-10)
    torch.testing.assert_close(ordinary, almost_one, rtol=0, atol=1e-7)
    assert (other - ordinary).abs().max() > 1e-6


def test_the_same_condition_twice_is_no_guidance(model: TARFlowModel) -> None:
    cond, _ = conditions(model, 2)
    z = random_images(model, 2)
    plain, _ = generate(model, z, cond)
    for method in ("gaussian", "linear"):
        guided, _ = generate(model, z, cond, cond, Guidance(3.0, method))
        torch.testing.assert_close(guided, plain, rtol=0, atol=1e-10)


def test_model_inverse_takes_the_null_condition() -> None:
    model = small_model(conditioning="prefix").double()
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    guided, _ = model.inverse(z, cond=cond, null_cond=null[:1], guidance=Guidance(1.0))
    expected, _ = generate(model, z, cond, null, Guidance(1.0))
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="needs cond"):
        model.inverse(z, cond=cond, guidance=Guidance(1.0))


def test_model_inverse_finds_the_null_label() -> None:
    for conditioning in ("class_vectors", "class_prefix"):
        model = small_model(conditioning=conditioning).double()
        z, labels = random_images(model, 2), torch.tensor([0, 2])
        guided, _ = model.inverse(z, labels, guidance=Guidance(1.0))
        null = model.condition(torch.full((2,), model.null_label), None, 2)
        expected, _ = generate(model, z, model.condition(labels, None, 2), null, Guidance(1.0))
        torch.testing.assert_close(guided, expected, rtol=0, atol=1e-10)


def test_the_callback_sees_and_replaces_each_block(model: TARFlowModel) -> None:
    cond, _ = conditions(model, 2)
    z = random_images(model, 2)
    seen: list[tuple[int, Tensor]] = []
    x, _ = generate(model, z, cond, callback=lambda place, images: seen.append((place, images.clone())))
    assert [place for place, _ in seen] == [0, 1]
    assert torch.equal(seen[-1][1], x)
    _, _, outputs = model(x, **from_cond(model, cond), return_block_outputs=True)
    torch.testing.assert_close(seen[0][1], outputs[0], rtol=0, atol=1e-9)
    replaced, _ = generate(model, z, cond, callback=lambda place, images: 2 * images if place == 1 else None)
    torch.testing.assert_close(replaced, 2 * x, rtol=0, atol=1e-10)


def from_cond(model: TARFlowModel, cond: Tensor | None) -> dict[str, Tensor | None]:
    """The model's keyword arguments for a condition as blocks take it."""
    kind = model.config.conditioning
    if kind == "class_prefix":
        return {"class_labels": cond[:, 0].argmax(-1)}
    return {"class_labels": cond} if kind == "class_vectors" else {"cond": cond}


def test_prefill_in_runs_is_one_parallel_pass(model: TARFlowModel) -> None:
    cond, _ = conditions(model, 2)
    for block in model.blocks:
        context = block.context(cond, GRID)
        tokens = torch.randn(2, 4, block.proj_in.in_features).double()
        expected = block.affine_parameters(tokens, 0, context)
        for runs in ((4,), (1, 1, 1, 1), (2, 2), (1, 3), (3, 1)):
            cache = block.new_cache(2, context.prefix_length + 4, torch.float64)
            first, parts = 0, []
            for length in runs:
                parts.append(block.affine_parameters(tokens[:, first : first + length], first, context, cache))
                first += length
            assert cache.length == cache.capacity
            for place in (0, 1):
                together = torch.cat([part[place] for part in parts], 1)
                torch.testing.assert_close(together, expected[place], rtol=0, atol=1e-12)


def test_a_truncated_cache_can_be_filled_again(model: TARFlowModel) -> None:
    cond, _ = conditions(model, 2)
    block = model.blocks[-1]
    tokens = torch.randn(2, 4, block.proj_in.in_features).double()
    context = block.context(cond, GRID)
    cache = block.new_cache(2, context.prefix_length + 4, torch.float64)
    block.affine_parameters(torch.cat([tokens[:, :1], -tokens[:, 1:]], 1), 0, context, cache)
    cache.truncate(context.prefix_length + 1)
    shift, log_scale = block.affine_parameters(tokens[:, 1:], 1, context, cache)
    expected = block.affine_parameters(tokens, 0, context)
    torch.testing.assert_close(shift, expected[0][:, 1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(log_scale, expected[1][:, 1:], rtol=0, atol=1e-12)


def test_a_full_cache_is_an_error() -> None:
    cache = KVCache(1, 1, 2, 3, 4, torch.device("cpu"), torch.float32)
    part = torch.ones(1, 2, 2, 4)
    cache.write(0, part, part)
    cache.advance(2)
    with pytest.raises(ValueError, match="3 slots, cannot hold 4"):
        cache.write(0, part, part)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_guided_parameters_are_the_formulas(weight: float) -> None:
    shift, log_scale, shift_u, log_scale_u = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    pairs = ((shift, log_scale), (shift_u, log_scale_u))
    cases = [(guide_gaussian(*pairs, weight), Guidance(weight))]
    cases += [(guide_linear(*pairs, weight, part), Guidance(weight, "linear", part)) for part in ("a", "b", "ab")]
    for (new_shift, new_log_scale), guidance in cases:
        scale, scale_u = log_scale.exp(), log_scale_u.exp()
        expected = guided_by_definition(guidance, shift, scale, shift_u, scale_u, 1, 4)
        torch.testing.assert_close(new_shift, expected[0])
        torch.testing.assert_close(new_log_scale.exp(), expected[1])
        called = guidance(*pairs, 1, 4)
        torch.testing.assert_close(called[0], new_shift, rtol=0, atol=1e-12)
        torch.testing.assert_close(called[1], new_log_scale, rtol=0, atol=1e-12)


def test_gaussian_guidance_of_equal_scales_moves_the_mean_only() -> None:
    shift, shift_u, log_scale = torch.randn(3, 1, 1, 6, dtype=torch.float64)
    new_shift, new_log_scale = guide_gaussian((shift, log_scale), (shift_u, log_scale), 2.0)
    torch.testing.assert_close(new_shift, 3 * shift - 2 * shift_u)
    torch.testing.assert_close(new_log_scale, log_scale)


def test_annealed_weights_grow_to_the_full_one() -> None:
    shift, log_scale, shift_u, log_scale_u = torch.randn(4, 1, 1, 3, dtype=torch.float64)
    annealed, full = Guidance(2.0, "linear", annealed=True), Guidance(2.0, "linear")
    pairs = ((shift, log_scale), (shift_u, log_scale_u))
    assert torch.equal(annealed(*pairs, 0, 5)[0], shift)
    torch.testing.assert_close(annealed(*pairs, 4, 5)[0], full(*pairs, 4, 5)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(annealed(*pairs, 2, 5)[1], log_scale + 1.0 * (log_scale - log_scale_u))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.5}, "guidance_scale at least 1"),
        ({"weight": float("nan")}, "guidance weight must be 0 or positive"),
        ({"weight": 1.0, "method": "cfg"}, "one of gaussian, linear, linear_scale, got 'cfg'"),
        ({"weight": 1.0, "parts": "c"}, "'a', 'b' or 'ab', got 'c'"),
        ({"weight": 1.0, "temperature": 0.0}, "temperature must be positive"),
        ({"weight": 1.0, "parts": "b"}, "guided parts 'b' would have no effect with the guidance method 'gaussian'"),
        ({"weight": 1.0, "annealed": True}, "annealed guidance would have no effect .* take guidance_method 'linear'"),
    ],
)
def test_wrong_guidance_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**arguments)


def test_one_token_alone() -> None:
    model = small_model(sample_size=2, conditioning="class_prefix").double()
    x, labels = random_images(model, 2), torch.tensor([0, 1])
    z, log_det = model(x, labels)
    y, inverse_log_det = model.inverse(z, labels)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(inverse_log_det, log_det)
    annealed, _ = model.inverse(z, labels, guidance=Guidance(1.0, "linear", annealed=True))
    torch.testing.assert_close(annealed, x)
    shifted = small_model(sample_size=2, start_token=False, conditioning="class_vectors", positions="learned").double()
    z, log_det = shifted(x, labels)
    assert torch.equal(z, x)
    assert torch.equal(shifted.inverse(z, labels)[0], x)
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_no_pictures_at_all(method: str) -> None:
    model = small_model(conditioning="class_prefix", condition_blocks="deep")
    noise = random_images(model, 1)[:0]
    z, log_det = model(noise, torch.zeros(0, dtype=torch.long))
    assert (z.shape, log_det.shape) == (noise.shape, (0,))
    x, log_det = generate(
        model, noise, model.condition(torch.zeros(0, dtype=torch.long), None, 0), decoding=Decoding(method)
    )
    assert (x.shape, log_det.shape, x.dtype) == (noise.shape, (0,), torch.float32)
