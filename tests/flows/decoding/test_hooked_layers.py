"""Layers that are more than their weights: hooks, adapters, parametrizations, quantized, offloaded and cast weights.

Whatever acts on a flow's layers, drawing must be the inverse of `forward` as it then is, by every method.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook
from helpers import perturb, random_images, small_model
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tarflow.flows.decoding import fast_step
from tarflow.flows.decoding.calibration import calibrate, decodings
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import Decoding, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.decoding.step import DecodeStep, ModuleStep, decode_step
from tarflow.flows.editing import HeldFlow
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.prepared import may_prepare
from tarflow.flows.model import TARFlowModel

TARGETS = ["proj_in", "qkv", "proj", "up", "down", "proj_out"]


def add_lora(model: nn.Module, name: str = "default", **changes: Any) -> None:
    """An adapter of random weights on all linear layers."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": TARGETS, **changes})
    inject_adapter_in_model(config, model, adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.normal_(std=0.1)
            if f"lora_magnitude_vector.{name}" in key:
                parameter.mul_(1.1)


def lora_layers(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, BaseTunerLayer)]


def two_adapters(model: nn.Module) -> None:
    add_lora(model)
    add_lora(model, "other", r=3)
    for layer in lora_layers(model):
        layer.set_adapter(["default", "other"])
        layer.set_scale("other", 0.5)


def merged_adapter(model: nn.Module) -> None:
    add_lora(model)
    for layer in lora_layers(model):
        layer.merge()


def linear_of(model: TARFlowModel, name: str = "up") -> nn.Linear:
    return getattr(model.blocks[1].layers[0].mlp, name)


def forward_hook(model: TARFlowModel) -> None:
    linear_of(model).register_forward_hook(lambda module, inputs, output: 1.5 * output + 0.1)


def forward_pre_hook(model: TARFlowModel) -> None:
    linear_of(model).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.3,))


def hook_of_attention(model: TARFlowModel) -> None:
    model.blocks[1].layers[0].attention.register_forward_hook(lambda module, inputs, output: 2 * output + 0.1)


def hook_of_output(model: TARFlowModel) -> None:
    model.blocks[0].proj_out.register_forward_hook(lambda module, inputs, output: output + 0.1)


class AddHalf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05


def parametrization(model: TARFlowModel) -> None:
    parametrize.register_parametrization(linear_of(model), "weight", AddHalf())


def normed_weight(model: TARFlowModel) -> None:
    weight_norm(linear_of(model))
    with torch.no_grad():
        linear_of(model).parametrizations.weight.original0.mul_(1.5)


def replaced_forward(model: TARFlowModel) -> None:
    linear = linear_of(model)
    linear.forward = MethodType(lambda self, x: nn.functional.linear(x, 2 * self.weight, self.bias), linear)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 0.1


def another_class(model: TARFlowModel) -> None:
    linear_of(model).__class__ = Doubled


class AddHook(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 1.5 * output + 0.1


def diffusers_hook(model: TARFlowModel) -> None:
    HookRegistry.check_if_exists_or_initialize(linear_of(model)).register_hook(AddHook(), "add")


CHANGES: dict[str, Callable[[Any], None]] = {
    "lora": add_lora,
    "lora_of_two": two_adapters,
    "lora_merged": merged_adapter,
    "lora_dora": lambda model: add_lora(model, use_dora=True),
    "lora_bias": lambda model: add_lora(model, lora_bias=True),
    "forward_hook": forward_hook,
    "forward_pre_hook": forward_pre_hook,
    "hook_of_attention": hook_of_attention,
    "hook_of_output": hook_of_output,
    "parametrization": parametrization,
    "normed_weight": normed_weight,
    "replaced_forward": replaced_forward,
    "another_class": another_class,
    "diffusers_hook": diffusers_hook,
}
#: Of these the prepared weights are still all there is.
PREPARED = {"lora", "lora_of_two", "lora_merged"}
GUIDANCES = {"none": None, "gaussian": Guidance(1.0), "temperature": Guidance(0.5, temperature=1.2)}


def the_model(**changes: Any) -> TARFlowModel:
    torch.manual_seed(0)
    return perturb(small_model(conditioning="class_prefix", qk_norm=True, **changes), std=0.05)


def drawn(model: TARFlowModel, guidance: Guidance | None = None, fast: FastSteps | None = None, **how: Any) -> Tensor:
    """Samples by a method, of which it is checked that the flow leads them back to their noise."""
    size = model.config.sample_size
    z = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(1))
    cond = model.condition(torch.tensor([0, 1, 2]), None, 3)
    null = model.condition(None, None, 3)
    if how.get("method") == "auto":
        choices = calibrate(model, z, cond, null, guidance, 1e-6, fast)
        decoding = decodings(choices, 1e-6)
    else:
        decoding = Decoding(**how)
    x, _ = generate(model, z, cond, null, guidance, decoding=decoding, fast=fast)
    worst, _ = residual(model, x, z, cond, null, guidance)
    assert worst.max() < 1e-4
    return x


METHODS = [
    {"method": "sequential"},
    {"method": "jacobi", "tolerance": 1e-6},
    {"method": "gs_jacobi", "tolerance": 1e-6, "segment": 3},
    {"method": "auto"},
]


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("change", CHANGES)
def test_every_method_sees_what_acts_on_layers(change: str, guidance: str) -> None:
    model, how = the_model(), GUIDANCES[guidance]
    plain = drawn(model, how)
    CHANGES[change](model)
    assert [may_prepare(block) for block in model.blocks] != [True, True] or change in PREPARED
    samples = [drawn(model, how, **method) for method in METHODS]
    samples.append(drawn(model, how, FastSteps(backend=None)))
    for x in samples:
        torch.testing.assert_close(x, samples[0], rtol=0, atol=1e-4)
    assert (samples[0] - plain).abs().max() > 1e-2  # so a method that did not see the change would be noticed


def test_prepared_steps_are_for_plain_layers() -> None:
    model = the_model()
    assert all(isinstance(made_step(block), DecodeStep) for block in model.blocks)
    forward_hook(model)
    assert isinstance(made_step(model.blocks[0]), DecodeStep)
    assert isinstance(made_step(model.blocks[1]), ModuleStep)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert not may_prepare(model.blocks[0])
    finally:
        handle.remove()
    assert may_prepare(model.blocks[0])
    model.blocks[0].compile()  # compiled layers have the same numbers
    model.blocks[0].layers[0] = torch.compile(model.blocks[0].layers[0], backend="eager")
    assert may_prepare(model.blocks[0])
    model.blocks[0].proj_in.to(torch.bfloat16)
    assert not may_prepare(model.blocks[0])


def made_step(block: Any) -> Any:
    cond = nn.functional.one_hot(torch.zeros(1, dtype=torch.long), 4).float()[:, None]
    return decode_step(block, block.context(cond, (4, 4)), block.new_cache(1, 17, torch.float32))


def test_a_class_wide_patch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = the_model()
    plain, forward = drawn(model), type(model.blocks[0].layers[0].mlp).forward
    monkeypatch.setattr(type(model.blocks[0].layers[0].mlp), "forward", lambda self, x: 2 * forward(self, x) + 0.1)
    assert not may_prepare(model.blocks[0])
    assert (drawn(model) - plain).abs().max() > 1e-2


def test_adapters_may_change_between_calls() -> None:
    model, fast = the_model(), FastSteps(backend=None)
    plain = drawn(model, fast=fast)
    add_lora(model)
    adapted = drawn(model, fast=fast)
    assert (adapted - plain).abs().max() > 1e-2
    for layer in lora_layers(model):
        layer.set_scale("default", 0.5)
    half = drawn(model, fast=fast)
    assert (adapted - half).abs().max() > 1e-2
    for layer in lora_layers(model):
        layer.merge()
    torch.testing.assert_close(drawn(model, fast=fast), half, rtol=0, atol=1e-4)
    for layer in lora_layers(model):
        layer.unmerge()
        layer.enable_adapters(False)
    torch.testing.assert_close(drawn(model, fast=fast), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 9])  # weights of many rows are copied
def test_fast_steps_take_over_weights_that_are_changed_unseen(rows: int) -> None:
    model, fast = the_model(), FastSteps(backend=None)
    z = random_images(model, rows)
    cond = model.condition(torch.arange(rows) % 3, None, rows)
    before, _ = generate(model, z, cond, fast=fast)
    for name, parameter in model.named_parameters():
        if "proj" in name or "up" in name or "norm" in name:
            parameter.data += 0.02  # as when adapters are fused: torch does not count this as a change
    after, _ = generate(model, z, cond, fast=fast)
    assert residual(model, after, z, cond)[0].max() < 1e-4
    assert (after - before).abs().max() > 1e-3


def test_uncompiled_steps_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fast_step.logger, "warning_once", said.append)
    model = the_model()
    drawn(model, fast=FastSteps(backend=None))
    assert not said
    forward_hook(model)
    drawn(model, fast=FastSteps(backend=None))
    assert "not compiled" in said[0] and "enable_fast_decoding" in said[0]


def test_sixteen_bits_keep_an_adapter_exact() -> None:
    model = the_model().to(torch.bfloat16)
    add_lora(model)
    assert not may_prepare(model.blocks[0])  # adding a small change to a 16-bit weight would lose a part of it


def test_a_hole_is_filled_by_what_acts_on_layers() -> None:
    model = small_model(sample_size=8)
    forward_hook(model)
    reference, hole = random_images(model, 2), torch.zeros(2, 4, 4, dtype=torch.bool)
    hole[:, 1:3, 1:3] = True
    held = HeldFlow(model, reference, hole)
    noise = torch.randn(2, 16, 8) * held.hole
    x, log_det = held.inverse(noise)
    back, back_log_det = held.forward(x)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(back_log_det, log_det, rtol=0, atol=1e-3)


def offload_all(model: TARFlowModel) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("conditioning", ["class_prefix", "class_vectors"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_offloaded_weights_come_when_they_are_needed(positions: str, conditioning: str) -> None:
    torch.manual_seed(0)
    model = small_model(sample_size=8, conditioning=conditioning, positions=positions)
    z, labels = random_images(model, 2), torch.tensor([0, 2])
    expected, _ = model.inverse(z, class_labels=labels, guidance=Guidance(1.0))
    offload_all(model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    x, _ = model.inverse(z, class_labels=labels, guidance=Guidance(1.0))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    back, _ = model(x, class_labels=labels)
    assert back.isfinite().all()


def test_layerwise_casting_computes_in_its_own_dtype() -> None:
    model = the_model()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert linear_of(model).weight.dtype == torch.float8_e4m3fn
    for method in METHODS:
        drawn(model, **method)


def test_group_offloading_draws_the_same() -> None:
    model = the_model()
    expected = drawn(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(drawn(model), expected, rtol=0, atol=1e-4)


def test_coupling_blocks_see_it_too() -> None:
    torch.manual_seed(0)
    model = small_model(sample_size=8, block="coupling", mixing="lu", actnorm=True, qk_norm=True)
    z = random_images(model, 2)
    expected, _ = model.inverse(z)
    offload_all(model)
    x, _ = model.inverse(z)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x)[0], z, rtol=0, atol=1e-4)
