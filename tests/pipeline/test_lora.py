"""LoRA adapters on flow and text encoder, as users of Diffusers type them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import FILE, add, arguments, pipeline
from helpers import random_images, small_model
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import draw
from safetensors import safe_open

from tarflow import TARFlowPipeline
from tarflow.flows.adapters.adapters import adapter_layers, weight_of
from tarflow.flows.adapters.targets import LORA_TARGETS
from tarflow.flows.student import StudentModel
from tarflow.pipeline.call.student_sampling import flow_hashes

METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"decoding": "sequential"},
    "jacobi": {"decoding": "jacobi", "tolerance": 1e-6},
    "gs_jacobi": {"decoding": "gs_jacobi", "tolerance": 1e-6, "segment": 4},
    "auto": {"decoding": "auto", "tolerance": 1e-6},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with captions, in a folder; and adapters of its flow and text encoder, in another beside it."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = pipeline("prefix")
    pipe.save_pretrained(folder / "pipeline")
    add(pipe.flow)
    add(pipe.text_encoder, std=0.5, target_modules=["q", "v"])
    pipe.save_lora_weights(folder / "adapter", pipe.flow, pipe.text_encoder)
    torch.save(draw(pipe, **arguments(pipe)), folder / "expected.pt")
    return folder


def opened(saved: Path) -> TARFlowPipeline:
    pipe = TARFlowPipeline.from_pretrained(saved / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_default_targets_are_attention_and_mlp() -> None:
    model = small_model()
    add(model)
    assert {name.split(".")[-1] for name in adapter_layers(model)} == set(LORA_TARGETS)
    assert len(adapter_layers(model)) == 4 * sum(model.config.layers_per_block)
    with pytest.raises(ValueError, match="already exists"):
        add(model)
    with pytest.raises(ValueError, match="to_q"):
        model.add_adapter(LoraConfig(target_modules=["to_q"]), "other")


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_with_adapters(method: str, scale: float) -> None:
    pipe = pipeline()
    options = {**arguments(pipe), "guidance_scale": scale, **METHODS[method]}
    before = draw(pipe, **options)
    add(pipe.flow)
    output = pipe(**options, return_residual=True, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    assert output.residual_max.max() < 1e-4
    assert (output.images - before).abs().max() > 1e-2
    pipe.enable_fast_decoding(backend=None)
    torch.testing.assert_close(draw(pipe, **options), output.images, rtol=0, atol=1e-3)


def test_likelihood_and_score_step_know_adapters() -> None:
    pipe = pipeline()
    x, labels = random_images(pipe.flow, 2), torch.tensor([0, 1])
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        likelihood = pipe.log_likelihood(image, class_labels=[0, 1], noise=False)
        return likelihood.log_prob, pipe.remove_noise(x, True, labels, None)

    before = results()
    add(pipe.flow)
    z, _ = pipe.flow(x, labels)
    after = results()
    assert (after[0] - before[0]).abs().max() > 1e-2 and (after[1] - before[1]).abs().max() > 1e-3
    pipe.fuse_lora()  # the same as a part of the weights
    for one, other in zip(after, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe.flow(x, labels)[0], z, rtol=0, atol=1e-4)


def test_adapters_are_saved_and_loaded(saved: Path) -> None:
    pipe, expected = opened(saved), torch.load(saved / "expected.pt")
    before = draw(pipe, **arguments(pipe))
    assert (before - expected).abs().max() > 1e-2
    pipe.load_lora_weights(saved / "adapter", adapter_name="style")
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), expected, rtol=0, atol=1e-5)
    assert pipe.get_list_adapters() == {"flow": ["style"], "text_encoder": ["style"]}
    assert pipe.get_active_adapters() == ["style"]
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before, rtol=0, atol=1e-5)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(str(saved / "adapter" / FILE))
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before, rtol=0, atol=1e-5)
    pipe.enable_lora()
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), expected, rtol=0, atol=1e-5)
    pipe.delete_adapters("default_0")
    assert not adapter_layers(pipe.flow) and not adapter_layers(pipe.text_encoder)
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before, rtol=0, atol=1e-5)


def test_the_file_holds_names_and_settings(saved: Path) -> None:
    with safe_open(saved / "adapter" / FILE, "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"flow", "text_encoder"}  # noqa: SIM118
        assert '"flow.lora_alpha": 8' in file.metadata()["lora_adapter_metadata"]


def test_weights_by_name_and_without_settings(saved: Path, tmp_path: Path) -> None:
    pipe = opened(saved)
    add(pipe.flow, lora_alpha=2)
    add(pipe.text_encoder, std=0.5, target_modules=["q", "v"], lora_alpha=2)
    expected = draw(pipe, **arguments(pipe))
    layers = get_peft_model_state_dict(pipe.flow), get_peft_model_state_dict(pipe.text_encoder)
    TARFlowPipeline.save_lora_weights(tmp_path, *layers)
    other = opened(saved)
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(other, **arguments(other)), expected, rtol=0, atol=1e-5)
    pipe.flow.save_lora_adapter(tmp_path / "flow")
    other = opened(saved)
    other.load_lora_weights(tmp_path / "flow")
    assert other.get_list_adapters() == {"flow": ["default_0"]}
    again = other.flow(torch.ones(1, 8, 4, 4), cond=torch.ones(1, 2, 16))[0]
    torch.testing.assert_close(again, pipe.flow(torch.ones(1, 8, 4, 4), cond=torch.ones(1, 2, 16))[0])


@pytest.mark.parametrize("method", METHODS)
def test_fused_adapters_draw_the_same(saved: Path, method: str) -> None:
    pipe, options = opened(saved), METHODS[method]
    before = draw(pipe, **{**arguments(pipe), **options})
    pipe.load_lora_weights(saved / "adapter")
    expected = draw(pipe, **{**arguments(pipe), **options})
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(draw(pipe, **{**arguments(pipe), **options}), expected, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe, **{**arguments(pipe), **options}), expected, rtol=0, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe, **{**arguments(pipe), **options}), before, rtol=0, atol=1e-4)


def test_a_fused_pipeline_is_saved_whole(saved: Path, tmp_path: Path) -> None:
    pipe = opened(saved)
    pipe.load_lora_weights(saved / "adapter")
    for save in (pipe.save_pretrained, pipe.flow.save_pretrained):
        with pytest.raises(ValueError, match=r"save_lora_weights.*unload_lora_weights"):
            save(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "whole")
    again = TARFlowPipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again, **arguments(again)), torch.load(saved / "expected.pt"), rtol=0, atol=1e-4)


def test_dropout_is_for_training_alone(saved: Path, tmp_path: Path) -> None:
    pipe = opened(saved)
    add(pipe.flow, lora_dropout=0.5)
    add(pipe.text_encoder, std=0.5, target_modules=["q", "v"], lora_dropout=0.5)
    pipe.text_encoder.eval()  # PEFT itself leaves new layers in training mode
    expected = draw(pipe, **arguments(pipe))
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), expected, rtol=0, atol=1e-5)
    pipe.save_lora_weights(tmp_path, pipe.flow, pipe.text_encoder)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    output = pipe(**arguments(pipe), return_residual=True, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    assert output.residual_max.max() < 1e-4
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-5)


def test_adapters_mix_by_weight() -> None:
    pipe = pipeline()
    none = draw(pipe, **arguments(pipe))
    add(pipe.flow, "one")
    one = draw(pipe, **arguments(pipe))
    add(pipe.flow, "two")
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), one, rtol=0, atol=1e-5)
    pipe.set_adapters(["one", "two"], 0.0)
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), none, rtol=0, atol=1e-5)
    pipe.set_adapters("two", {"flow": {"blocks.0": 0.5, "blocks.1": 0.25}})
    scales = {name[:8]: layer.scaling["two"] for name, layer in adapter_layers(pipe.flow).items()}
    assert scales == {"blocks.0": 2.0, "blocks.1": 1.0}  # of alpha 8 and rank 2
    with pytest.raises(ValueError, match="other"):
        pipe.set_adapters("other")
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        pipe.flow.set_adapters(["one", "two"], [1.0])
    with pytest.raises(ValueError, match=r"blocks\.7"):
        pipe.flow.set_adapters("one", [{"blocks.7": 0.5}])
    assert weight_of({"blocks.1": 0.5, "blocks.1.layers.0": 2.0}, "blocks.1.layers.0.mlp.up") == 2.0
    assert weight_of({"blocks.1": 0.5}, "blocks.10.layers.0.mlp.up") == 1.0


def test_bad_files_are_refused(saved: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    with pytest.raises(ValueError, match="text encoder"):
        pipe.load_lora_weights(saved / "adapter")
    with pytest.raises(ValueError, match=r"unet\.down"):
        pipe.load_lora_weights({"unet.down.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="empty"):
        pipe.load_lora_weights({})
    with pytest.raises(ValueError, match="scale"):
        pipe.load_lora_weights(tmp_path, scale=2)
    with pytest.raises(ValueError, match=r"cannot read adapters from .*nothing"):
        pipe.load_lora_weights(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no file named pytorch_lora_weights\.safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="it has: none"):
        pipe.save_lora_weights(tmp_path, pipe.flow)
    add(pipe.flow, "one")
    add(pipe.flow, "two")
    with pytest.raises(ValueError, match="one, two"):
        pipe.save_lora_weights(tmp_path, pipe.flow)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        pipe.save_lora_weights(tmp_path / "file", pipe.flow, adapter_name="one")
    pipe.save_lora_weights(tmp_path, pipe.flow, adapter_name="two")
    wider = TARFlowPipeline(small_model(conditioning="class_prefix", in_channels=8, patch_size=1, width=96))
    with pytest.raises(ValueError, match=r"do not fit the pipeline: size mismatch for .*more") as error:
        wider.load_lora_weights(tmp_path)
    assert "\n" not in str(error.value)
    assert wider.get_list_adapters() == {} and not adapter_layers(wider.flow)


def test_a_student_does_not_know_adapters() -> None:
    pipe = pipeline()
    config = pipe.flow.config
    pipe.student = StudentModel(
        in_channels=8,
        sample_size=4,
        num_layers=1,
        width=64,
        head_dim=32,
        conditioning=config.conditioning,
        num_classes=3,
        flow_hashes=flow_hashes(pipe.flow),
    ).eval()
    options = {**arguments(pipe), "decoding": "student", "denoise": None}
    options["output_type"] = "latent"
    before = draw(pipe, **options)
    add(pipe.flow)
    with pytest.raises(ValueError, match="does not know the flow's adapters"):
        draw(pipe, **options)
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe, **options), before)
    pipe.enable_lora()
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="adapters"):
        draw(pipe, **options)
    pipe.unload_lora_weights()  # the weights stay changed
    with pytest.raises(ValueError, match="another flow"):
        draw(pipe, **options)


def test_training_an_adapter_leaves_the_flow_alone() -> None:
    model = small_model()
    add(model, lora_dropout=0.5)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    model.train()
    model.set_checkpointing("layer")  # dropout is drawn again as it was
    x = random_images(model, 2)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        z, log_det = model(x)
        (z.pow(2).sum() - log_det.sum()).backward()
        return [parameter.grad.clone() for name, parameter in model.named_parameters() if "lora_B" in name]

    recomputed = gradients()
    model.set_checkpointing("none")
    for one, other in zip(recomputed, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_nothing_is_said_of_parts_without_adapters(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    pipe = pipeline("prefix")
    add(pipe.flow)
    pipe.save_lora_weights(tmp_path, pipe.flow)
    pipe.unload_lora_weights()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(tmp_path)
    assert not caplog.records
    assert np.isfinite(draw(pipe, **{**arguments(pipe), "output_type": "np"})).all()


def test_an_adapter_of_a_deeper_flow_is_refused(tmp_path: Path) -> None:
    pipe, deeper = pipeline(), pipeline(layers_per_block=(1, 3))
    add(deeper.flow)
    before = draw(pipe, **arguments(pipe))
    TARFlowPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(deeper.flow))
    with pytest.raises(ValueError, match="of another flow: this one has no place for 16 of its 32 weights"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {}
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before, rtol=0, atol=1e-5)
