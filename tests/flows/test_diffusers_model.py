"""Flows and students as Diffusers' models: attention backends, checkpointing, dtypes, casting, offloading, compiling."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.training_utils import EMAModel
from flow_kinds import KINDS, flow_of
from helpers import random_images, small_model
from students import lone_student
from torch import Tensor

from tarflow.flows.decoding.method import Decoding
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.habits import FlowOutput, StudentOutput
from tarflow.flows.layers.attention import LAST_SEES_LAST, TAKE_MASKS, attend, attend_by
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.vae.decoder import LatentDecoder

#: Diffusers' backends that run on a CPU.
ON_CPUS = ("native", "_native_math", "_native_flash", "flex")
flows_of_each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    """Each test begins and ends with the process's default backend and dtype."""
    active, dtype = _AttentionBackendRegistry._active_backend, torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype
    _AttentionBackendRegistry.set_active_backend(active)


# Attention backends


@pytest.mark.parametrize("earlier", [None, 0, 4])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("backend", ON_CPUS)
def test_backends_agree_with_the_plain_path(backend: str, slots: int, earlier: int | None) -> None:
    torch.manual_seed(0)
    seen = slots + (earlier or 0)
    q = torch.randn(2, 4, slots, 16, dtype=torch.float64)  # two slots in a batch of two: a mask of queries and keys
    k, v = torch.randn(2, 2, 2, seen, 16, dtype=torch.float64)
    expected = attend(q, k, v, earlier)
    found = attend_by(AttentionBackendName(backend), q, k, v, earlier)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def causal_kernel(last_sees_last: bool) -> Callable[..., Tensor]:
    """What a kernel without masks computes, (B, S, H, d), aligned at one end or the other where S < N."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if is_causal:
            mask = mask.tril(k.shape[2] - q.shape[2] if last_sees_last else 0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return kernel


@pytest.mark.parametrize("earlier", [None, 0, 4])
@pytest.mark.parametrize("backend", sorted(set(_AttentionBackendRegistry.list_backends()) - set(ON_CPUS)))
def test_kernels_without_masks_get_a_flag_that_means_the_same(
    backend: AttentionBackendName, earlier: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that no CPU has are played by one that refuses masks where theirs do, and aligns its triangle as they do."""
    kernel = causal_kernel(backend.value in LAST_SEES_LAST)

    def played(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        assert query.dtype == key.dtype == value.dtype and query.shape[2] == key.shape[2]
        if attn_mask is None:
            return kernel(query, key, value, is_causal)
        assert backend.value in TAKE_MASKS and attn_mask.ndim == 4 and not is_causal
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)

    takes = _AttentionBackendRegistry._supported_arg_names[backend] & {
        "query", "key", "value", "attn_mask", "is_causal"
    }  # fmt: skip
    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, played)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, backend, takes)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 16), *torch.randn(2, 2, 2, 5 + (earlier or 0), 16)
    torch.testing.assert_close(attend_by(backend, q, k, v, earlier), attend(q, k, v, earlier), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [*itertools.product([name for name in ON_CPUS if name != "flex"], KINDS), ("flex", "prefix"), ("flex", "coupling")],
)
def test_a_flow_with_a_backend_gives_what_it_gives_without(backend: str, kind: str) -> None:
    model, x, condition = flow_of(kind, sample_size=4, layers_per_block=(1, 1))
    with torch.no_grad():
        z, log_det = model(x, **condition)
        model.set_attention_backend(backend)
        found, found_log_det = model(x, **condition)
        torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_log_det, log_det, rtol=1e-4, atol=1e-4)
        made = model.condition(condition.get("class_labels"), condition.get("cond"), len(z))
        methods = [Decoding("gs_jacobi", segment=2)] if kind != "coupling" else []
        for decoding in [None, *(methods if kind != "inverse" else [])]:
            back, _ = generate(model, z, made, decoding=decoding)
            torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [name for name in ON_CPUS if name != "flex"])
def test_training_with_a_backend_gives_the_same_gradients(backend: str) -> None:
    model, x, condition = flow_of("prefix")
    expected = gradients(model, x, condition)
    model.set_attention_backend(backend)
    for name, gradient in gradients(model, x, condition).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def gradients(model: torch.nn.Module, x: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of all parameters of a loss on everything that the model returns."""
    model.zero_grad()
    outputs = model(x, **condition)
    sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("backend", ON_CPUS)
def test_a_round_trip_with_a_backend_is_as_exact_as_float64(backend: str) -> None:
    model, _, condition = flow_of("prefix")
    model.double().set_attention_backend(backend)
    x, condition = random_images(model, 3), {"cond": condition["cond"].double()}
    with torch.no_grad():
        z, _ = model(x, **condition)
        for decoding in (None, Decoding("gs_jacobi", segment=4, tolerance=1e-12)):
            back, _ = generate(model, z, condition["cond"], decoding=decoding)
            torch.testing.assert_close(back, x, rtol=0, atol=1e-10)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of backends, one for each time that one is asked."""
    names: list[str] = []
    for backend in map(AttentionBackendName, ("_native_math", "native")):
        function = _AttentionBackendRegistry._backends[backend]

        def counted(*args: Any, function: Any = function, name: str = backend.value, **options: Any) -> Tensor:
            names.append(name)
            return function(*args, **options)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, counted)
    return names


@pytest.mark.parametrize("network", ["flow", "student"])
def test_backends_are_set_for_a_model_or_in_a_context_and_reset(network: str, asked: list[str]) -> None:
    model = small_model() if network == "flow" else lone_student()
    x, layers = torch.randn(2, 2, 4, 4), 3 if network == "flow" else 2
    model(x)
    assert not asked
    with attention_backend("_native_math"):
        model(x)
    assert asked == ["_native_math"] * layers
    model(x)
    assert len(asked) == layers
    model.set_attention_backend("native")
    model(x)
    assert asked[layers:] == ["native"] * layers
    model.set_attention_backend("_native_math")
    model(x)
    assert len(asked) == 3 * layers
    model.reset_attention_backend()
    model(x)
    assert len(asked) == 3 * layers


def test_a_backend_or_processor_that_does_not_exist_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="flash_hub"):  # the names that there are
        model.set_attention_backend("quick")
    with pytest.raises(ValueError, match="set_attention_backend"):
        model.blocks[0].layers[0].attention.set_processor(object())


# Gradient checkpointing and outputs


@flows_of_each_kind
def test_gradient_checkpointing_keeps_the_gradients(kind: str) -> None:
    model, x, condition = flow_of(kind)
    assert not model.is_gradient_checkpointing
    expected = gradients(model, x, condition)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    found = gradients(model, x, condition)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_of_a_student_keeps_the_gradients() -> None:
    model, x = lone_student(state_layers=(1,), through_states=True), torch.randn(2, 2, 4, 4)
    expected = gradients(model, x, {})
    calls = []

    def recomputing(layer: torch.nn.Module, *inputs: Any) -> Any:
        calls.append(layer)
        return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)

    model.enable_gradient_checkpointing(recomputing)
    found = gradients(model, x, {})
    assert calls == list(model.layers) and model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    model.enable_gradient_checkpointing()
    again = gradients(model, x, {})
    assert len(calls) == 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(again[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_of_any_unit_is_seen_and_switched_off() -> None:
    model = small_model()
    for unit in ("block", "layer", "both"):
        model.set_checkpointing(unit)
        assert model.is_gradient_checkpointing
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing and not model.checkpoint_blocks


def test_outputs_are_tuples_or_named() -> None:
    model, x, _ = flow_of("plain")
    z, log_det = model(x, return_dict=False)
    named = model(x, return_dict=True, return_block_outputs=True)
    assert isinstance(named, FlowOutput) and torch.equal(named.z, z) and torch.equal(named.log_det, log_det)
    assert len(named.block_outputs) == 2 and len(model(x, return_dict=True).to_tuple()) == 2
    student, noise = lone_student(state_layers=(1,)), torch.randn(2, 2, 4, 4)
    plain = student(noise)
    (in_tuple,) = student(noise, return_dict=False)
    named = student(noise, return_dict=True, return_states=True)
    assert isinstance(named, StudentOutput) and torch.equal(named.sample, plain) and torch.equal(in_tuple, plain)
    assert len(named.states) == 1


def test_parallelism_over_one_image_is_refused(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="TARFlowModel has no context or tensor parallelism"):
        model.enable_parallelism(config=object())
    with pytest.raises(ValueError, match="TARFlowModel has no context or tensor parallelism"):
        TARFlowModel.from_pretrained(tmp_path, parallel_config=object())
    with pytest.raises(ValueError, match="StudentModel has no context or tensor parallelism"):
        lone_student().enable_parallelism(config=object())


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@flows_of_each_kind
def test_flows_are_loaded_and_run_in_16_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x, condition = flow_of(kind)
    model.save_pretrained(tmp_path)
    for half in (TARFlowModel.from_pretrained(tmp_path, dtype=dtype), copy.deepcopy(model).to(dtype)):
        assert all(tensor.dtype == dtype for tensor in half.state_dict().values() if tensor.is_floating_point())
        condition = {key: part.to(dtype) if part.is_floating_point() else part for key, part in condition.items()}
        with torch.no_grad():
            (z, log_det), (expected, expected_log_det) = half(x.to(dtype), **condition), model(x, **condition)
            assert z.dtype == log_det.dtype == torch.float32
            torch.testing.assert_close(z, expected, rtol=0.1, atol=0.05)
            torch.testing.assert_close(log_det, expected_log_det, rtol=0.1, atol=1.0)
            seen = half.condition(condition.get("class_labels"), condition.get("cond"), len(x))
            back, _ = generate(half, z, seen)
        assert back.dtype == torch.float32
        torch.testing.assert_close(back, x.to(dtype).float(), rtol=0.1, atol=0.1)


def test_an_error_while_loading_leaves_the_default_dtype(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "flow")
    lone_student().save_pretrained(tmp_path / "student")
    for kind, folder, key in ((TARFlowModel, "flow", "width"), (StudentModel, "student", "head_dim")):
        file = tmp_path / folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: 7}))
        with pytest.raises(ValueError, match="head_dim"):
            kind.from_pretrained(tmp_path / folder, torch_dtype=torch.bfloat16)
        assert torch.get_default_dtype() == torch.float32
    config = {"_class_name": "LatentDecoder", "act_fn": "unheard-of"}
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    (tmp_path / "decoder" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="unheard-of"):
        LatentDecoder.from_pretrained(tmp_path / "decoder", torch_dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_an_error_while_loading_a_pipeline_leaves_the_default_dtype(tmp_path: Path) -> None:
    TARFlowPipeline(flow=small_model(), vae=None).save_pretrained(tmp_path)
    # A part of another library, whose class leaves another default behind.
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vae": ["diffusers", "AutoencoderKL"]}))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "act_fn": "unheard-of"}))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="unheard-of"):
        TARFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert torch.get_default_dtype() == torch.float32


# Saving and loading


@pytest.mark.parametrize("network", ["flow", "student"])
@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "40KB"}, {"safe_serialization": False}]
)
def test_networks_are_saved_and_loaded(network: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_model() if network == "flow" else lone_student()
    model.save_pretrained(tmp_path, **options)
    weights = [file for file in tmp_path.iterdir() if file.suffix in (".safetensors", ".bin")]
    assert len(weights) > 1 if "max_shard_size" in options else len(weights) == 1
    loaded = type(model).from_pretrained(tmp_path, variant=options.get("variant"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 2, 4, 4)
    expected, found = model(x, return_dict=False)[0], loaded(x, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_average_of_weights_is_saved_and_loaded(tmp_path: Path) -> None:
    model = small_model()
    EMAModel(model.parameters(), model_cls=TARFlowModel, model_config=model.config).save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, model_cls=TARFlowModel)
    for average, parameter in zip(loaded.shadow_params, model.parameters(), strict=True):
        torch.testing.assert_close(average, parameter.data, rtol=0, atol=0)


@flows_of_each_kind
def test_all_parameters_learn(kind: str) -> None:
    model, x, condition = flow_of(kind)
    outputs = (*model(x, **condition), *([] if model.denoiser is None else [model.scaled_score(x, **condition)]))
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
