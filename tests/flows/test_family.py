"""NICE, RealNVP, Glow and IAF as settings of the same model: inverses, log-determinants, gradients, memory, drawing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import condition_of, jacobian, perturb, random_images, small_model
from pipelines import make_pipeline
from torch import Tensor

from tarflow.benchmarks.memory import training_memory
from tarflow.flows.decoding.calibration import calibrate
from tarflow.flows.decoding.method import Decoding, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.layers.actnorm import ActNorm
from tarflow.flows.layers.groups import seen_group
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.mixing import ChannelMixing
from tarflow.flows.model import TARFlowModel

GLOW = {"block": "coupling", "mixing": "lu", "actnorm": True}
CASES: dict[str, dict[str, Any]] = {
    "nice": {"block": "coupling", "scale": "additive"},
    "realnvp": {"block": "coupling", "scale": "exp", "groups": "halves", "layers_per_block": (1, 1, 1)},
    "realnvp-prefix": {"block": "coupling", "conditioning": "prefix", "start_token": False},
    "realnvp-vectors": {"block": "coupling", "conditioning": "class_vectors", "positions": "learned"},
    "glow": {**GLOW, "layers_per_block": (1, 1, 1)},
    "glow-prefix": {**GLOW, "conditioning": "class_prefix", "groups": "halves", "patch_layout": "channel_first"},
    "iaf": {"block": "inverse_autoregressive"},
    "iaf-prefix": {"block": "inverse_autoregressive", "conditioning": "prefix", "layers_per_block": (1, 0, 1)},
    "iaf-vectors": {
        "block": "inverse_autoregressive",
        "conditioning": "class_vectors",
        "start_token": False,
        "positions": "learned",
    },
}
COUPLING = [name for name in CASES if not name.startswith("iaf")]


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> TARFlowModel:
    return small_model(**CASES[request.param]).double()


def conditions(model: TARFlowModel, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """A condition and none, as the blocks take them."""
    given = condition_of(model, batch)
    if model.config.conditioning == "prefix":
        return given["cond"], torch.zeros_like(given["cond"])
    if not given:
        return None, None
    return model.condition(given["class_labels"], None, batch), model.condition(None, None, batch)


def test_inverse_undoes_forward(model: TARFlowModel) -> None:
    x, condition = random_images(model, 3), condition_of(model, 3)
    z, log_det = model(x, **condition)
    y, inverse_log_det = model.inverse(z, **condition)
    assert (z - x).abs().max() > 1e-3, "the model is the identity, so the test says nothing"
    torch.testing.assert_close(y, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, log_det, rtol=0, atol=1e-10)
    with torch.no_grad():  # where keys and values are cached, if token after token is made
        other, other_log_det = model(x, **condition)
    torch.testing.assert_close(other, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(other_log_det, log_det, rtol=0, atol=1e-10)
    if model.config.scale == "additive":
        assert torch.equal(log_det, torch.zeros_like(log_det))


def test_log_det_is_that_of_the_jacobian(model: TARFlowModel) -> None:
    x, condition = random_images(model, 1), condition_of(model, 1)
    _, log_det = model(x, **condition)
    _, expected = torch.linalg.slogdet(jacobian(lambda x: model(x, **condition)[0], x))
    assert abs(expected - log_det[0]) < 1e-9


def test_float32_and_bfloat16() -> None:
    for name in ("glow", "iaf"):
        model = small_model(**CASES[name])
        x = random_images(model, 2)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            z, log_det = model.to(dtype)(x)
            assert z.dtype == log_det.dtype == torch.float32
            torch.testing.assert_close(model.inverse(z)[0], x, rtol=0, atol=tolerance)


def test_groups_cover_all_tokens_once() -> None:
    board = [True, False, True, False, True, False]
    assert seen_group((2, 3), "checkerboard", False).tolist() == board
    assert seen_group((2, 3), "halves", False).tolist() == [True] * 3 + [False] * 3
    for groups in ("checkerboard", "halves"):
        for grid in ((1, 1), (1, 2), (3, 3), (4, 6)):
            seen = seen_group(grid, groups, False)
            assert torch.equal(seen, ~seen_group(grid, groups, True))
            assert abs(2 * int(seen.sum()) - grid[0] * grid[1]) <= 1
    with pytest.raises(ValueError, match="groups must be one of checkerboard, halves, got 'rows'"):
        seen_group((2, 2), "rows", False)


@pytest.mark.parametrize("groups", ["checkerboard", "halves"])
def test_the_seen_group_passes_and_the_other_sees_only_it(groups: str) -> None:
    model = small_model(block="coupling", groups=groups).double()
    x, _ = model.patchify(random_images(model, 1))
    for index, block in enumerate(model.blocks):
        seen = seen_group((2, 2), groups, index % 2 == 0)  # first_order is "reversed"
        z, _ = block(x, (2, 2))
        assert torch.equal(z[:, seen], x[:, seen])
        matrix = jacobian(lambda x, block=block: block(x, (2, 2))[0], x).reshape(4, 8, 4, 8).permute(0, 2, 1, 3)
        for out in (~seen).nonzero()[:, 0]:
            for other in range(4):
                part = matrix[out, other]
                if seen[other]:
                    assert part.abs().max() > 1e-7
                elif other == out:
                    assert torch.equal(part, part.diagonal().diag()) and (part.diagonal() > 0).all()
                else:
                    assert torch.equal(part, torch.zeros_like(part)), "a changed token sees another one"


def test_mixing_is_the_matrix_that_its_factors_make() -> None:
    mixing = ChannelMixing(6).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    z, log_det = mixing(x)
    torch.testing.assert_close(z.norm(dim=2), x.norm(dim=2), msg="it does not start as a rotation", rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(2).double(), rtol=0, atol=1e-5)
    perturb(mixing, 0.3)
    z, log_det = mixing(x)
    matrix = torch.stack([mixing(unit.view(1, 1, 6))[0][0, 0] for unit in torch.eye(6).double()], dim=1)
    torch.testing.assert_close(z, torch.einsum("oc,btc->bto", matrix, x))
    torch.testing.assert_close(log_det, (3 * torch.linalg.slogdet(matrix)[1]).expand(2))
    back, inverse_log_det = mixing.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, log_det, rtol=0, atol=1e-12)


def test_actnorm_is_set_by_a_batch_and_only_when_asked() -> None:
    actnorm = ActNorm(3).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.0]) + torch.tensor([1.0, -3.0, 7.0])
    assert torch.equal(actnorm(x)[0], x)
    actnorm.initialize(x)
    z, log_det = actnorm(x)
    torch.testing.assert_close(z.mean((0, 1)), torch.zeros(3).double())
    torch.testing.assert_close(z.std((0, 1), correction=0), torch.tensor([1.0, 1.0, 0.0]).double())
    torch.testing.assert_close(log_det[0], -4 * x[..., :2].std((0, 1), correction=0).log().sum())
    model = small_model(**CASES["glow"]).double()
    images = 3 * random_images(model, 64) + 1
    model.initialize_actnorm(images)
    tokens, grid = model.patchify(images)
    for block in model.blocks:
        normed, _ = block.actnorm(tokens)
        torch.testing.assert_close(normed.mean((0, 1)), torch.zeros(8).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(normed.std((0, 1), correction=0), torch.ones(8).double())
        tokens, _ = block(tokens, grid)


def gradients(model: TARFlowModel, x: Tensor, condition: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Of all parameters, the input and a prefix; and the bytes that are kept for the backward pass."""
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    model.zero_grad()
    leaves = {"x": x.clone().requires_grad_()}
    leaves |= {key: value.clone().requires_grad_() for key, value in condition.items() if value.is_floating_point()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        z, log_det = model(**{**condition, **leaves})
    (z.pow(2).sum() - log_det.sum()).backward()
    named = {**dict(model.named_parameters()), **leaves}
    return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}, saved


@pytest.mark.parametrize("name", COUPLING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_reversible_training_has_the_same_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = small_model(**CASES[name]).to(dtype)
    x, condition = random_images(model, 3), condition_of(model, 3)
    expected, all_saved = gradients(model, x, condition)
    model.set_checkpointing("reversible")
    found, saved = gradients(model, x, condition)
    assert saved < all_saved
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        difference = (found[key] - gradient).abs().max() / max(1.0, float(gradient.abs().max()))
        assert difference < tolerance, key


def test_reversible_memory_does_not_grow_with_depth() -> None:
    arguments = {"in_channels": 2, "sample_size": 8, "width": 64, "head_dim": 32, **GLOW}
    activations = {
        (mode, blocks): training_memory(
            {**arguments, "layers_per_block": [1] * blocks}, 4, precision="float32", mode=mode
        ).activations
        for mode in ("none", "reversible")
        for blocks in (1, 4)
    }
    assert activations["none", 4] > 3 * activations["none", 1]
    assert activations["reversible", 4] < 1.02 * activations["reversible", 1]


def test_reversible_training_has_one_backward_pass() -> None:
    model = small_model(**CASES["glow"])
    model.set_checkpointing("reversible")
    z, log_det = model(random_images(model, 2))
    loss = z.pow(2).sum() - log_det.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward pass"):
        loss.backward()


@pytest.mark.parametrize("name", CASES)
def test_generate_calibrate_and_residual(name: str) -> None:
    model = small_model(**CASES[name]).double()
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    x, _ = generate(model, z, cond, null)
    choices = calibrate(model, z, cond, null, None, 1e-4)
    assert [choice.method for choice in choices] == ["parallel"] * len(model.blocks)
    for decoding in (Decoding("parallel"), Decoding("sequential")):
        torch.testing.assert_close(generate(model, z, cond, null, decoding=decoding)[0], x, rtol=0, atol=1e-10)
    assert residual(model, x, z, cond, null)[0].max() < 1e-10
    with pytest.raises(ValueError, match="inverted exactly in one parallel pass, so there is no 'jacobi'"):
        generate(model, z, cond, null, decoding=Decoding("jacobi"))


def test_parallel_decoding_is_not_for_autoregressive_blocks() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="these ones make token after token"):
        generate(model, random_images(model, 1), decoding=Decoding("parallel"))


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_guidance_of_coupling_blocks(method: str) -> None:
    model = small_model(**CASES["realnvp-prefix"]).double()
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    guidance = Guidance(1.5, method)
    x, _ = generate(model, z, cond, null, guidance)
    assert (x - generate(model, z, cond)[0]).abs().max() > 1e-5
    tokens, grid = model.patchify(z)
    for block in reversed(model.blocks):
        pairs = [block.group_parameters(tokens, grid, which, None, None) for which in (cond, null)]
        shift, log_scale = guidance(*pairs, 3, 4)
        tokens = tokens * log_scale.exp() + shift
    torch.testing.assert_close(x, model.unpatchify(tokens, grid))
    assert residual(model, x, z, cond, null, guidance)[0].max() < 1e-10
    torch.testing.assert_close(generate(model, z, cond, cond, guidance)[0], generate(model, z, cond)[0])


def test_inverse_autoregressive_blocks_have_no_guidance() -> None:
    model = small_model(**CASES["iaf-prefix"]).double()
    cond, null = conditions(model, 2)
    with pytest.raises(ValueError, match="no guidance: they know the noise before a token"):
        generate(model, random_images(model, 2), cond, null, Guidance(1.0))


def test_iaf_is_the_teacher_backwards() -> None:
    teacher = small_model().double()
    student = small_model(**CASES["iaf"]).double()
    student.load_state_dict(teacher.state_dict())
    x, _ = teacher.patchify(random_images(teacher, 2))
    for forwards, backwards in zip(teacher.blocks, student.blocks, strict=True):
        z, log_det = forwards(x, (2, 2))
        same, negative = backwards.inverse(x, (2, 2))
        torch.testing.assert_close(same, z)
        torch.testing.assert_close(negative, -log_det)
        swept, _ = backwards.encode(z, (2, 2), decoding=Decoding("jacobi", 1e-12))
        torch.testing.assert_close(swept, x)


def test_pipelines_of_the_family_draw(tmp_path: Any) -> None:
    pipe = make_pipeline(**GLOW)
    options = {"class_labels": [0, 1], "output_type": "latent", "guidance_scale": 2.0, "return_residual": True}
    outputs = [
        pipe(generator=torch.Generator().manual_seed(3), decoding=decoding, **options)
        for decoding in ("auto", "sequential", "parallel", "fast")
    ]
    for output in outputs:
        torch.testing.assert_close(output.images, outputs[0].images, rtol=0, atol=1e-5)
        assert output.residual_max.max() < 1e-4
    with pytest.raises(ValueError, match="so there is no 'gs_jacobi'"):
        pipe(class_labels=[0, 1], decoding="gs_jacobi", segment=2)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    found = again(generator=torch.Generator().manual_seed(3), **options)
    torch.testing.assert_close(found.images, outputs[0].images)
    pipe = make_pipeline("none", block="inverse_autoregressive")
    output = pipe(num_images=2, output_type="latent", return_residual=True)
    assert output.residual_max.max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "glow"}, "block must be one of autoregressive, coupling, inverse_autoregressive, got 'glow'"),
        ({"block": "coupling", "groups": "rows"}, "groups must be one of checkerboard, halves"),
        ({"block": "coupling", "mixing": "qr"}, "mixing must be one of none, lu, got 'qr'"),
        ({"mixing": "lu"}, "mixing and actnorm are for block 'coupling', not 'autoregressive'"),
        ({"block": "inverse_autoregressive", "actnorm": True}, "for block 'coupling'"),
    ],
)
def test_settings_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


def test_reversible_is_for_coupling_blocks() -> None:
    with pytest.raises(ValueError, match="'reversible' is for block 'coupling', not 'autoregressive'"):
        small_model().set_checkpointing("reversible")
    model = small_model(block="coupling")
    model.set_checkpointing("reversible")
    with pytest.raises(ValueError, match="keeps no blocks' outputs"):
        model(random_images(model, 1), return_block_outputs=True)
