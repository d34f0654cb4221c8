"""Flows of TorchAO's int8 weights draw by every method, are loaded and saved as in Diffusers, and take adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import add, arguments
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from helpers import perturb
from pipelines import draw, make_pipeline

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.common.tensors import dequantized, is_quantized

quantization = pytest.importorskip("torchao.quantization")

METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"decoding": "sequential"},
    "jacobi": {"decoding": "jacobi", "tolerance": 1e-6},
    "gs_jacobi": {"decoding": "gs_jacobi", "tolerance": 1e-6, "segment": 4},
    "auto": {"decoding": "auto", "tolerance": 1e-6},
}


def pipeline() -> TARFlowPipeline:
    torch.manual_seed(0)
    pipe = make_pipeline("class_prefix")
    perturb(pipe.flow, std=0.05)
    return pipe


def int8(pipe: TARFlowPipeline) -> TARFlowPipeline:
    """The same pipeline with the flow's weights quantized by hand."""
    quantization.quantize_(pipe.flow, quantization.Int8WeightOnlyConfig())
    assert is_quantized(pipe.flow.blocks[0].layers[0].mlp.up.weight)
    return pipe


def settings() -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(quant_mapping={"flow": TorchAoConfig(quantization.Int8WeightOnlyConfig())})


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_with_int8_weights(method: str, scale: float) -> None:
    pipe = pipeline()
    options = {**arguments(pipe), "guidance_scale": scale, **METHODS[method]}
    plain = draw(pipe, **options)
    int8(pipe)
    output = pipe(**options, return_residual=True, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    assert output.residual_max.max() < 1e-4
    assert 1e-4 < (output.images - plain).abs().max() < 0.5  # it is another flow, but not a very different one
    pipe.enable_fast_decoding(backend=None)  # its steps are not compiled, and right
    torch.testing.assert_close(draw(pipe, **options), output.images, rtol=0, atol=1e-3)


def test_dequantized_weights_are_the_same_flow() -> None:
    pipe = int8(pipeline())
    other = pipeline()
    other.flow.load_state_dict({name: dequantized(value) for name, value in pipe.flow.state_dict().items()})
    for output, expected in zip(draw(pipe, **arguments(pipe)), draw(other, **arguments(other)), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    x, labels = torch.randn(2, 8, 4, 4), torch.tensor([0, 1])
    torch.testing.assert_close(pipe.flow(x, labels)[1], other.flow(x, labels)[1], rtol=1e-4, atol=1e-3)
    scored, expected = (one.remove_noise(x, True, labels, None) for one in (pipe, other))
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-3)


def test_loaded_and_saved_as_in_diffusers(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "plain")
    options = {"torch_dtype": torch.float32}
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "plain", quantization_config=settings(), **options)
    flow = TARFlowModel.from_pretrained(
        tmp_path / "plain",
        subfolder="flow",
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        **options,
    )
    by_hand = int8(TARFlowPipeline.from_pretrained(tmp_path / "plain"))
    pipe.save_pretrained(tmp_path / "quantized")
    again = TARFlowPipeline.from_pretrained(tmp_path / "quantized", **options)
    for other in (pipe, again, by_hand):
        other.set_progress_bar_config(disable=True)
    assert is_quantized(again.flow.blocks[0].proj_in.weight)
    expected = draw(by_hand, **arguments(by_hand))
    for other in (pipe, again):
        torch.testing.assert_close(draw(other, **arguments(other)), expected, rtol=0, atol=1e-3)
    x, labels = torch.randn(2, 8, 4, 4), torch.tensor([0, 1])
    torch.testing.assert_close(flow(x, labels)[0], by_hand.flow(x, labels)[0], rtol=0, atol=1e-3)


def test_weights_that_were_quantized_by_hand_are_not_saved(tmp_path: Path) -> None:
    pipe = int8(pipeline())
    for save in (pipe.save_pretrained, pipe.flow.save_pretrained):
        with pytest.raises(ValueError, match="quantization_config=TorchAoConfig"):
            save(tmp_path / "quantized")


def test_adapters_on_int8_weights(tmp_path: Path) -> None:
    pipe = pipeline()
    add(pipe.flow)
    pipe.save_lora_weights(tmp_path, pipe.flow)
    with_adapter = draw(pipe, **arguments(pipe))
    pipe.unload_lora_weights()
    int8(pipe)
    plain = draw(pipe, **arguments(pipe))
    pipe.load_lora_weights(tmp_path)
    output = pipe(**arguments(pipe), return_residual=True, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    assert output.residual_max.max() < 1e-4
    assert (output.images - plain).abs().max() > 1e-2
    assert (output.images - with_adapter).abs().max() < 0.5 * (plain - with_adapter).abs().max()
