"""Adapters that are loaded into pipelines whose parts are offloaded, and what refused ones leave."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from adapters import FILE, add, arguments, pipeline
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from peft import LoraConfig
from pipelines import draw
from torch import nn

from tarflow import TARFlowPipeline
from tarflow.cli.main import main
from tarflow.flows.adapters.adapters import adapter_layers, adapters_state

CPU = torch.device("cpu")
PARTS = ("flow", "text_encoder")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of flow and text encoder in a folder, and what a pipeline draws with it."""
    folder, pipe = tmp_path_factory.mktemp("adapter"), pipeline("prefix")
    add(pipe.flow)
    add(pipe.text_encoder, std=0.5, target_modules=["q", "v"])
    pipe.save_lora_weights(folder, pipe.flow, pipe.text_encoder)
    torch.save(draw(pipe, **arguments(pipe)), folder / "expected.pt")
    return folder


def misfit(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The adapter with one weight of another shape."""
    state = dict(TARFlowPipeline.lora_state_dict(folder))
    name = max(name for name in state if name.startswith(part) and "lora_B" in name)
    return state | {name: torch.zeros(7, 2)}


def by_groups(pipe: TARFlowPipeline, kind: str, **options: Any) -> None:
    for part in PARTS:
        apply_group_offloading(
            getattr(pipe, part),
            CPU,
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            **options,
        )


def group_of(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    hook = registry and registry.get_hook(_GROUP_OFFLOADING)
    return hook and hook.group


@pytest.mark.parametrize("part", PARTS)
def test_model_offload_stays_after_a_refusal(adapter: Path, part: str) -> None:
    pipe = pipeline("prefix")
    before = draw(pipe, **arguments(pipe))
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"^these adapters do not fit the pipeline: size mismatch for") as error:
        pipe.load_lora_weights(misfit(adapter, part))
    assert "\n" not in str(error.value)
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in PARTS) and pipe._all_hooks
    assert pipe.get_list_adapters() == {} and not adapter_layers(pipe.flow) and not adapter_layers(pipe.text_encoder)
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before)
    pipe.load_lora_weights(adapter)
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in PARTS)
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), torch.load(adapter / "expected.pt"))


def test_sequential_offload_reaches_new_layers(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = accelerate.cpu_offload  # Diffusers' "cpu:0" is another device than "cpu" for accelerate
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **options: plain(model, CPU, **options))
    pipe = pipeline("prefix")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="do not fit"):
        pipe.load_lora_weights(misfit(adapter, "text_encoder"))
    assert pipe.flow.blocks[0].proj_in.weight.device.type == "meta"
    pipe.load_lora_weights(adapter)
    for part in PARTS:
        for layer in adapter_layers(getattr(pipe, part)).values():
            assert layer.lora_A["default_0"].weight.device.type == "meta"
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), torch.load(adapter / "expected.pt"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_knows_new_layers(adapter: Path, kind: str) -> None:
    pipe = pipeline("prefix")
    before = draw(pipe, **arguments(pipe))
    by_groups(pipe, kind)
    with pytest.raises(ValueError, match="do not fit"):
        pipe.load_lora_weights(misfit(adapter, "text_encoder"))
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before)
    pipe.load_lora_weights(adapter)
    for part in PARTS:
        model = getattr(pipe, part)
        groups = [group for module in model.modules() if (group := group_of(module)) is not None]
        held = {id(value) for group in groups for value in group.parameters}
        held |= {id(value) for group in groups for module in group.modules for value in module.parameters()}
        assert held == {id(value) for value in model.parameters()}
        if kind == "leaf_level":
            assert all(group_of(layer.lora_A["default_0"]) for layer in adapter_layers(model).values())
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), torch.load(adapter / "expected.pt"))
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before)


def test_a_flow_by_itself_gives_new_layers_hooks() -> None:
    flow = pipeline().flow
    flow.enable_group_offload(CPU, offload_type="leaf_level")
    flow.add_adapter(LoraConfig(r=2))
    assert all(group_of(layer.lora_A["default"]) for layer in adapter_layers(flow).values())


def test_weights_in_files_get_and_lose_no_adapters(adapter: Path, tmp_path: Path) -> None:
    pipe = pipeline("prefix")
    by_groups(pipe, "leaf_level", offload_to_disk_path=str(tmp_path / "one"))
    with pytest.raises(ValueError, match="offloaded to files"):
        pipe.load_lora_weights(adapter)
    pipe = pipeline("prefix")
    pipe.load_lora_weights(adapter)
    by_groups(pipe, "leaf_level", offload_to_disk_path=str(tmp_path / "two"))
    for change in (pipe.unload_lora_weights, lambda: pipe.delete_adapters("default_0"), pipe.flow.unload_lora):
        with pytest.raises(ValueError, match="offloaded to files"):
            change()
    assert pipe.get_list_adapters() == {"flow": ["default_0"], "text_encoder": ["default_0"]}


def test_other_adapters_are_as_before_a_refusal(adapter: Path) -> None:
    pipe = pipeline("prefix")
    add(pipe.flow, "one", target_modules=["qkv"])
    add(pipe.flow, "two", target_modules=["qkv", "up"])
    pipe.flow.set_adapters(["one", "two"], [0.5, 2.0])
    trained = [parameter.requires_grad for parameter in pipe.flow.parameters()]
    state, before = adapters_state(pipe.flow), draw(pipe, **arguments(pipe))
    for part in PARTS:
        with pytest.raises(ValueError, match="do not fit"):
            pipe.load_lora_weights(misfit(adapter, part))
    assert adapters_state(pipe.flow) == state
    assert [parameter.requires_grad for parameter in pipe.flow.parameters()] == trained
    assert pipe.get_list_adapters() == {"flow": ["one", "two"]}
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), before)


def test_names_are_given_once(adapter: Path) -> None:
    pipe = pipeline("prefix")
    pipe.load_lora_weights(adapter, adapter_name="one")
    expected = draw(pipe, **arguments(pipe))
    texts = {name: value for name, value in misfit(adapter, "text").items() if name.startswith("text")}
    for state in (adapter, texts):
        with pytest.raises(ValueError, match="there is an adapter 'one' already"):
            pipe.load_lora_weights(state, adapter_name="one")
    torch.testing.assert_close(draw(pipe, **arguments(pipe)), expected)


def test_a_refused_swap_leaves_the_adapter(adapter: Path) -> None:
    pipe = pipeline("prefix")
    state = {name: value for name, value in TARFlowPipeline.lora_state_dict(adapter).items() if name.startswith("flow")}
    pipe.load_lora_weights(state, adapter_name="one")
    pipe.set_adapters("one", 0.5)
    expected = draw(pipe, **arguments(pipe))
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    for wrong in ({"flow.blocks.9.lora_A.weight": torch.ones(2, 2)}, {max(state): torch.zeros(999, 2)}):
        with pytest.raises(ValueError):
            pipe.load_lora_weights(other | wrong, adapter_name="one", hotswap=True)
        assert pipe.get_list_adapters() == {"flow": ["one"]}
        torch.testing.assert_close(draw(pipe, **arguments(pipe)), expected)
    pipe.load_lora_weights(other, adapter_name="one", hotswap=True)
    assert (draw(pipe, **arguments(pipe)) - expected).abs().max() > 1e-3


def test_files_may_be_read_by_others(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert stat.S_IMODE((adapter / FILE).stat().st_mode) == usual
    flow = pipeline().flow
    add(flow)
    flow.to(torch.bfloat16).save_lora_adapter(tmp_path / "flow", upcast_before_saving=True)
    assert stat.S_IMODE((tmp_path / "flow" / FILE).stat().st_mode) == usual
    assert flow.dtype == torch.bfloat16
    assert {value.dtype for value in TARFlowPipeline.lora_state_dict(tmp_path / "flow").values()} == {torch.float32}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        flow.save_lora_adapter(tmp_path / "file")
    with pytest.raises(ValueError, match="it has: default"):
        flow.save_lora_adapter(tmp_path, "other")


def test_the_command_line_refuses_in_a_sentence(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    pipeline("prefix").save_pretrained(tmp_path / "pipeline")
    save_file(misfit(adapter, "flow"), tmp_path / "wrong.safetensors")
    arguments = [
        "generate",
        "a dog",
        "--pipeline",
        str(tmp_path / "pipeline"),
        "--lora",
        str(tmp_path / "wrong.safetensors"),
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "picture.png")])
    assert stop.value.code == 2
    assert "error: these adapters do not fit the pipeline: size mismatch" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()
