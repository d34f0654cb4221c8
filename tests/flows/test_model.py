"""The whole flow: every combination of settings is invertible with the right log-determinant; wrong ones are errors."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_kinds import RICH
from helpers import condition_of, jacobian, random_images, small_model
from torch import Tensor

from tarflow.flows.layers.order import reorder
from tarflow.flows.model import TARFlowModel

CASES: dict[str, dict[str, Any]] = {
    f"{scale}-{positions}-{conditioning}-{'start' if start else 'shifted'}": {
        "scale": scale,
        "positions": positions,
        "conditioning": conditioning,
        "start_token": start,
        "soft_clip": 4.0 if start else 0.0,
    }
    for scale, positions, conditioning, start in product(
        ("exp", "softplus", "additive"),
        ("learned", "rotary", "rotary_1d"),
        ("none", "class_vectors", "class_prefix", "prefix"),
        (True, False),
    )
}
CASES |= {
    "rich": {**RICH, "bias": False, "conditioning": "prefix"},
    "rich-layer_norm": {**RICH, "norm": "layer_norm", "bias": True, "conditioning": "class_prefix"},
    "one_kv_head": {"num_heads": 4, "num_kv_heads": 1, "mlp_ratio": 2},
    "deep_width": {"deep_width": 96, "conditioning": "prefix"},
    "deep_condition_prefix": {"condition_blocks": "deep", "conditioning": "prefix"},
    "deep_condition_vectors": {"condition_blocks": "deep", "conditioning": "class_vectors"},
    "identity_blocks": {"layers_per_block": (1, 0, 0, 1)},
    "row_major": {"first_order": "row_major", "conditioning": "prefix"},
    "coarse_to_fine": {"deep_order": "coarse_to_fine", "conditioning": "prefix"},
    "outward": {"deep_order": "outward", "conditioning": "class_prefix", "num_classes": 3},
    "coarse_to_fine-learned": {"deep_order": "coarse_to_fine", "positions": "learned", "scale": "exp"},
    "channel_first": {"patch_layout": "channel_first", "final_norm": False},
    "position_length": {"position_length": 7},
    "clipped_shifted": {"start_token": False, "soft_clip": 0.5, "scale": "exp"},
    "learned_prior": {"learned_prior": True, "scale": "additive"},
}
FEW = (
    "exp-learned-class_vectors-shifted",
    "softplus-rotary-prefix-start",
    "additive-rotary-class_prefix-start",
    "rich",
)


@pytest.fixture(params=CASES, ids=list(CASES))
def model(request: pytest.FixtureRequest) -> TARFlowModel:
    return small_model(**CASES[request.param]).double()


@pytest.fixture(params=FEW)
def float_model(request: pytest.FixtureRequest) -> TARFlowModel:
    return small_model(**CASES[request.param])


def test_inverse_undoes_forward(model: TARFlowModel) -> None:
    x, condition = random_images(model, 2), condition_of(model, 2)
    before = x.clone()
    z, log_det = model(x, **condition)
    kept = z.clone()
    y, inverse_log_det = model.inverse(z, **condition)
    assert (z - x).abs().max() > 1e-3, "the model is the identity, so the test says nothing"
    assert (y - x).abs().max() < 1e-9
    torch.testing.assert_close(inverse_log_det, log_det, rtol=0, atol=1e-9)
    assert torch.equal(x, before)
    assert torch.equal(z, kept)
    assert log_det.shape == (2,)
    assert z.shape == x.shape
    if model.config.scale == "additive":
        assert torch.equal(log_det, torch.zeros_like(log_det))


def test_log_det_is_that_of_the_jacobian(model: TARFlowModel) -> None:
    x, condition = random_images(model, 1), condition_of(model, 1)
    _, log_det = model(x, **condition)
    sign, expected = torch.linalg.slogdet(jacobian(lambda x: model(x, **condition)[0], x))
    assert sign == 1
    assert abs(expected - log_det[0]) < 1e-9


def test_each_block_is_triangular_in_its_order(model: TARFlowModel) -> None:
    given = condition_of(model, 1)
    condition = model.condition(given.get("class_labels"), given.get("cond"), 1)
    x = random_images(model, 1)
    tokens, grid = model.patchify(x)
    for block in model.blocks:
        size = tokens.shape[2]
        matrix = jacobian(lambda x, block=block: block(x, grid, condition)[0], tokens)
        matrix = matrix.reshape(4, size, 4, size).permute(0, 2, 1, 3)  # (out token, in token, C, C)
        matrix = reorder(reorder(matrix, block.config.order, grid, dim=0), block.config.order, grid, dim=1)
        for out_token, in_token in product(range(4), range(4)):
            part = matrix[out_token, in_token]
            if out_token < in_token:
                assert torch.equal(part, torch.zeros_like(part)), f"token {out_token} sees the later {in_token}"
            elif out_token == in_token:
                assert torch.equal(part, part.diagonal().diag()), "the numbers of one token are not independent"
                assert (part.diagonal() > 0).all()
            elif out_token == in_token + 1:
                assert part.abs().max() > 0, f"token {out_token} does not see token {in_token}"
        _, log_det = block(tokens, grid, condition)
        logs = torch.stack([matrix[token, token].diagonal().log().sum() for token in range(4)])
        assert abs(logs.sum() - log_det[0]) < 1e-9


def test_every_parameter_gets_a_gradient(model: TARFlowModel) -> None:
    z, log_det = model(random_images(model, 3), **condition_of(model, 3))
    (z.pow(2).sum() / 2 - log_det.sum()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def test_orders_alternate_and_identity_blocks_count() -> None:
    orders = [block.config.order for block in small_model(layers_per_block=(1, 1, 1)).blocks]
    assert orders == ["reversed", "row_major", "reversed"]
    orders = [block.config.order for block in small_model(layers_per_block=(1, 0, 1, 1)).blocks]
    assert orders == ["reversed", "reversed", "row_major"]
    orders = [block.config.order for block in small_model(layers_per_block=(1, 1), first_order="row_major").blocks]
    assert orders == ["row_major", "reversed"]
    orders = [block.config.order for block in small_model(layers_per_block=(1, 1), deep_order="coarse_to_fine").blocks]
    assert orders == ["reversed", "coarse_to_fine"]


def test_an_untrained_model_is_the_identity() -> None:
    for scale in ("exp", "softplus", "additive"):
        model = TARFlowModel(in_channels=2, sample_size=4, layers_per_block=(1, 1), width=64, head_dim=32, scale=scale)
        x = torch.randn(2, 2, 4, 4)
        z, log_det = model(x)
        torch.testing.assert_close(z, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(log_det, torch.zeros(2), rtol=0, atol=1e-5)


def test_block_outputs_are_the_blocks_in_turn() -> None:
    model = small_model(layers_per_block=(1, 1, 1))
    x = random_images(model, 2)
    z, log_det, outputs = model(x, return_block_outputs=True)
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[-1], z, rtol=0, atol=1e-6)
    tokens, grid = model.patchify(x)
    total = 0.0
    for block, output in zip(model.blocks, outputs, strict=True):
        tokens, block_log_det = block(tokens, grid)
        total = total + block_log_det
        torch.testing.assert_close(model.unpatchify(tokens, grid), output, rtol=0, atol=1e-6)
    torch.testing.assert_close(total, log_det, rtol=0, atol=1e-5)


def test_samples_do_not_depend_on_their_batch(float_model: TARFlowModel) -> None:
    x, condition = random_images(float_model, 3), condition_of(float_model, 3)
    z, log_det = float_model(x, **condition)
    alone, alone_log_det = float_model(x[1:2], **{name: value[1:2] for name, value in condition.items()})
    torch.testing.assert_close(alone, z[1:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone_log_det, log_det[1:2], rtol=0, atol=1e-4)


def test_float32_round_trip(float_model: TARFlowModel) -> None:
    x, condition = random_images(float_model, 4), condition_of(float_model, 4)
    z, log_det = float_model(x, **condition)
    y, inverse_log_det = float_model.inverse(z, **condition)
    assert z.dtype == log_det.dtype == y.dtype == torch.float32
    assert (y - x).abs().max() <= 1e-4
    torch.testing.assert_close(inverse_log_det, log_det, rtol=0, atol=1e-4)


def test_bfloat16_weights_run_with_float32_results(float_model: TARFlowModel) -> None:
    x, condition = random_images(float_model, 2), condition_of(float_model, 2)
    expected, expected_log_det = float_model(x, **condition)
    float_model.to(torch.bfloat16)
    z, log_det = float_model(x, **condition)
    y, _ = float_model.inverse(z, **condition)
    assert z.dtype == log_det.dtype == y.dtype == torch.float32
    torch.testing.assert_close(z, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(log_det, expected_log_det, rtol=0, atol=0.5)
    assert (y - x).abs().max() < 0.05


def test_autocast_runs_both_ways(float_model: TARFlowModel) -> None:
    x, condition = random_images(float_model, 2), condition_of(float_model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = float_model(x, **condition)
        y, _ = float_model.inverse(z, **condition)
    assert z.dtype == log_det.dtype == torch.float32
    assert (y - x).abs().max() < 0.05


@pytest.mark.parametrize("positions", ["rotary", "rotary_1d"])
@pytest.mark.parametrize("size", [(2, 6), (6, 4)])
def test_other_sizes_with_rotary_positions(positions: str, size: tuple[int, int]) -> None:
    model = small_model(positions=positions, conditioning="prefix").double()
    x, condition = random_images(model, 2, *size), condition_of(model, 2)
    z, log_det = model(x, **condition)
    y, inverse_log_det = model.inverse(z, **condition)
    assert z.shape == x.shape
    assert (y - x).abs().max() < 1e-9
    torch.testing.assert_close(inverse_log_det, log_det)


@pytest.mark.parametrize("options", [{"positions": "learned"}, {"deep_order": "coarse_to_fine"}])
def test_other_sizes_with_learned_positions_are_an_error(options: dict[str, Any]) -> None:
    model = small_model(**options)
    with pytest.raises(ValueError, match="learned positions fit a grid of 2 × 2"):
        model(random_images(model, 1, 2, 6))
    with pytest.raises(ValueError, match="got 1 × 3"):
        model.inverse(random_images(model, 1, 2, 6))


def test_no_labels_means_no_class() -> None:
    for conditioning in ("class_vectors", "class_prefix"):
        model = small_model(conditioning=conditioning)
        x = random_images(model, 2)
        z, _ = model(x)
        null, _ = model(x, class_labels=torch.full((2,), model.null_label))
        first, _ = model(x, class_labels=torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(z, null, rtol=0, atol=1e-6)
        assert not torch.allclose(z, first, atol=1e-6)


def test_no_class_is_the_mean_of_the_class_vectors() -> None:
    model = small_model(conditioning="class_vectors")
    x = random_images(model, 1)
    without, _ = model(x)
    with torch.no_grad():
        for block in model.blocks:
            block.class_embed.copy_(block.class_embed.mean(0).expand_as(block.class_embed))
    for label in range(model.config.num_classes):
        z, _ = model(x, class_labels=torch.tensor([label]))
        torch.testing.assert_close(z, without, rtol=0, atol=1e-6)


def test_one_prefix_for_all_samples_and_any_length() -> None:
    model = small_model(conditioning="prefix")
    x = random_images(model, 2)
    cond = torch.randn(1, 7, model.config.cond_dim)
    shared, _ = model(x, cond=cond)
    repeated, _ = model(x, cond=cond.expand(2, -1, -1))
    torch.testing.assert_close(shared, repeated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*FEW, "identity_blocks", "learned_prior"])
def test_saved_and_loaded_is_identical(name: str, tmp_path: Path) -> None:
    model = small_model(**CASES[name])
    x, condition = random_images(model, 2), condition_of(model, 2)
    if model.prior_variance is not None:
        model.update_prior(2 * x)
    model.save_pretrained(tmp_path)
    loaded = TARFlowModel.from_pretrained(tmp_path)
    for key, value in model.config.items():
        if not key.startswith("_"):
            assert loaded.config[key] == (list(value) if isinstance(value, tuple) else value), key
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[key], loaded_state[key]) for key in state)
    for ours, theirs in zip(model(x, **condition), loaded(x, **condition), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_learned_prior_follows_the_mean_square() -> None:
    model = small_model(learned_prior=True, scale="additive")
    z = random_images(model, 5)
    model.update_prior(z)
    expected = 0.9 + 0.1 * z.pow(2).mean(0)
    torch.testing.assert_close(model.prior_variance_image(), expected)
    noise = torch.randn_like(z)
    torch.testing.assert_close(model.scale_noise(noise), noise * expected.sqrt())
    model.update_prior(z)
    torch.testing.assert_close(model.prior_variance_image(), 0.9 * expected + 0.1 * z.pow(2).mean(0))


def test_unit_prior_is_left_alone() -> None:
    model = small_model()
    z = random_images(model, 2)
    model.update_prior(z)
    assert model.prior_variance is None
    assert model.prior_variance_image() is None
    assert model.scale_noise(z) is z


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 48}, "head_dim 48 does not divide the width 64"),
        ({"deep_width": 80}, "head_dim 32 does not divide the width 80"),
        ({"layers_per_block": ()}, "at least one block"),
        ({"layers_per_block": (1, 0)}, "the last one with layers"),
        ({"layers_per_block": (-1, 1)}, "none negative"),
        ({"sample_size": 5}, "multiple of patch_size"),
        ({"sample_size": 0}, "positive multiple"),
        ({"patch_size": 0}, "positive multiple"),
        ({"patch_layout": "rows"}, "patch_layout must be one of channel_first, channel_last, got 'rows'"),
        ({"conditioning": "text"}, "conditioning must be one of none, class_vectors, class_prefix, prefix"),
        ({"condition_blocks": "first"}, "condition_blocks must be 'all' or 'deep', got 'first'"),
        ({"conditioning": "class_vectors", "num_classes": 0}, "needs num_classes of at least 1, got 0"),
        ({"conditioning": "class_prefix", "num_classes": 0}, "needs num_classes of at least 1, got 0"),
        ({"conditioning": "prefix", "cond_dim": 0}, "needs cond_dim of at least 1, got 0"),
        ({"mlp": "relu"}, "mlp must be one of gelu, geglu, got 'relu'"),
        ({"norm": "batch_norm"}, "norm must be one of layer_norm, rms_norm"),
        ({"scale": "sigmoid"}, "scale must be one of exp, softplus, additive"),
        ({"positions": "sine"}, "positions must be one of learned, rotary, rotary_1d"),
        ({"first_order": "random"}, "first_order must be one of row_major, reversed"),
        ({"deep_order": "spiral"}, "deep_order must be one of coarse_to_fine, outward, or left out, got 'spiral'"),
        (
            {"deep_order": "coarse_to_fine", "block": "coupling"},
            "with a start_token, got 'coupling' and True: leave it out",
        ),
        ({"deep_order": "coarse_to_fine", "start_token": False}, "got 'autoregressive' and False: leave it out"),
        (
            {"deep_order": "coarse_to_fine", "positions": "rotary_1d"},
            "which positions 'rotary_1d' do not know: take 'rotary'",
        ),
        ({"mlp_ratio": 0}, "mlp_ratio must be at least 1"),
        ({"num_heads": -2}, "num_heads must be at least 1"),
        ({"position_length": -1}, "position_length must be at least 1"),
        ({"num_heads": 4, "num_kv_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"soft_clip": -1.0}, "soft_clip must be 0"),
        ({"head_dim": 2}, "head_dim 2 does not fit rotary positions"),
        ({"head_dim": 16, "conditioning": "prefix"}, "8 of head_dim / 2 pairs are for the prefix; try 32 or 64"),
        ({"head_dim": 1, "positions": "rotary_1d"}, "head_dim must be even"),
    ],
)
def test_settings_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


@pytest.mark.parametrize(
    ("conditioning", "arguments", "message"),
    [
        ("class_vectors", {"class_labels": torch.tensor([0, 4])}, "class labels must be 0 to 3"),
        ("class_vectors", {"class_labels": torch.tensor([0, -1])}, "class labels must be 0 to 3"),
        ("class_prefix", {"class_labels": torch.tensor([0, 4])}, "class labels must be 0 to 3"),
        ("class_prefix", {"class_labels": torch.tensor([0])}, r"the shape \(2,\), got \(1,\)"),
        ("class_prefix", {"class_labels": torch.tensor([[0], [1]])}, r"the shape \(2,\), got \(2, 1\)"),
        ("class_prefix", {"cond": torch.zeros(2, 1, 5)}, "takes no cond"),
        ("none", {"cond": torch.zeros(2, 1, 5)}, "takes no cond"),
        ("none", {"class_labels": torch.tensor([0, 1])}, "unconditional"),
        ("prefix", {}, "needs cond"),
        ("prefix", {"class_labels": torch.tensor([0, 1])}, "not on class labels"),
        ("prefix", {"cond": torch.zeros(2, 5)}, r"cond must have the shape \(2, L, 5\), got \(2, 5\)"),
        ("prefix", {"cond": torch.zeros(2, 3, 6)}, r"got \(2, 3, 6\)"),
        ("prefix", {"cond": torch.zeros(3, 3, 5)}, r"got \(3, 3, 5\)"),
    ],
)
def test_wrong_conditions_are_errors(conditioning: str, arguments: dict[str, Tensor], message: str) -> None:
    model = small_model(conditioning=conditioning)
    x = random_images(model, 2)
    with pytest.raises(ValueError, match=message):
        model(x, **arguments)
    with pytest.raises(ValueError, match=message):
        model.inverse(x, **arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 4, 5), "multiples of the patch size 2"),
        ((1, 2, 3, 4), "multiples of the patch size 2"),
        ((1, 3, 4, 4), r"expected \(B, 2, H, W\)"),
        ((2, 4, 4), r"expected \(B, 2, H, W\)"),
    ],
)
def test_wrong_shapes_are_errors(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model()(torch.zeros(shape))


@pytest.mark.parametrize(("unit", "every"), [("block", 1), ("layer", 1), ("layer", 2), ("both", 1)])
def test_checkpointing_changes_no_gradient(unit: str, every: int) -> None:
    model = small_model(conditioning="prefix", layers_per_block=(2, 3)).double()
    x, condition = random_images(model, 3), condition_of(model, 3)

    def gradients() -> tuple[dict[str, Tensor], int]:
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            z, log_det = model(x, **condition)
        (z.pow(2).sum() - log_det.sum()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, saved

    expected, all_saved = gradients()
    model.set_checkpointing(unit, every)
    found, saved = gradients()
    assert saved < all_saved
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    model.set_checkpointing("none")
    assert gradients()[1] == all_saved


def test_bad_checkpointing() -> None:
    model = small_model()
    with pytest.raises(
        ValueError, match="checkpointing must be one of none, block, layer, both, reversible, got 'all'"
    ):
        model.set_checkpointing("all")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        model.set_checkpointing("layer", 0)
