"""Published iTARFlow models of any size as pipelines; variants that are not implemented are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor

from tarflow import TARFlowPipeline
from tarflow.cli.convert import main as convert
from tarflow.flows.conversion import convert_state_dict, model_arguments
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.conversion import convert_checkpoint, load_published

REFERENCE = ROOT / "tests" / "reference" / "itarflow_uncond"
CONFIG: dict[str, Any] = {
    "in_channels": 3, "img_size": 12, "patch_sizes": [3], "channels": [64, 64, 128], "num_blocks": 3,
    "layers_per_block": [1, 2, 3], "nvp": True, "num_classes": 4,
}  # fmt: skip


def published_state(model: TARFlowModel, layers: str) -> dict[str, Tensor]:
    """A model's weights by their published names, with what the published code saves too."""
    renamed = {"layers": layers, "up": "main.0", "down": "main.2"}
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("level_embed.up", "time_embed.mlp.0").replace("level_embed.down", "time_embed.mlp.2")
        parts = name.split(".")
        if "time_embed" not in parts:
            parts = [renamed.get(part, part) for part in parts]
        state[".".join(parts)] = value[:, None] if name.endswith("class_embed") else value
    for index in range(len(model.blocks)):
        state[f"blocks.{index}.attn_mask"] = torch.ones(2, 2)
    return {**state, "var": torch.ones(16, 27)}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, "head_blocks"),
        (
            {"patch_sizes": [2, 2, 2], "channels": [64], "layers_per_block": 1, "shared_backbone_layers": 0},
            "attn_blocks",
        ),
        ({"num_classes": 0, "patch_sizes": 4, "channels": 64, "layers_per_block": [2]}, "head_blocks"),
    ],
)
def test_sizes_and_depths_are_the_configs(changes: dict[str, Any], layers: str) -> None:
    config = {**CONFIG, **changes}
    model = TARFlowModel(**model_arguments(config))
    perturb(model)
    state = convert_state_dict(published_state(model, layers), config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    depths = config["layers_per_block"]
    depths = [depths] * 3 if isinstance(depths, int) else depths * (3 // len(depths))
    assert [len(block.layers) for block in model.blocks] == depths
    assert [block.level_embed is not None for block in model.blocks] == [True] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_backbone_layers": 2}, "shared_backbone_layers 2: layers that all blocks share are not implemented"),
        ({"patch_sizes": [4, 2, 2]}, r"patch_sizes \[4, 2, 2\]: blocks of several patch sizes are not implemented"),
        ({"channels": [64, 128, 128]}, r"channels \[64, 128, 128\]: only the last block"),
        ({"layers_per_block": [1, 1]}, "layers_per_block lists 2 blocks, but num_blocks is 3"),
        ({"channels": []}, "channels lists 0 blocks, but num_blocks is 3"),
        ({"mean_flow": True}, r"have unknown \['mean_flow'\]"),
    ],
)
def test_unknown_variants_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {**CONFIG, **changes}
    with pytest.raises(ValueError, match=message):
        model_arguments(config)
    (tmp_path / "config.json").write_text(json.dumps({"family": "itarflow", "model": config}))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(REFERENCE / "model.safetensors", tmp_path / "config.json", tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_a_converted_pipeline_draws_and_walks_as_the_published_code(tmp_path: Path) -> None:
    convert([
        *("--checkpoint", str(REFERENCE / "model.safetensors"), "--config", str(REFERENCE / "config.json")),
        *("--output", str(tmp_path / "pipeline"), "--noise-std", "0.3"),
    ])  # fmt: skip
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.noise_levels == (0.01, 0.3)
    assert (pipe.config.num_inference_steps, pipe.config.guidance_method) == (10, "linear_scale")
    expected = load_file(REFERENCE / "expected.safetensors")
    noise = pipe.flow.unpatchify(expected["prior_noise"], (8, 8))
    options = {"num_images": 4, "latents": noise, "output_type": "latent", "decoding": "sequential"}
    assert (pipe(**options, denoise=False).images - expected["sample_guidance0"]).abs().max() < 1e-4
    drawn = pipe(**options, num_inference_steps=4).images  # of pixels, so clamped
    walked = pipe.remove_noise(expected["sample_guidance0"], True, num_inference_steps=4)
    assert (drawn - walked).abs().max() < 1e-4
    found = pipe.remove_noise(expected["x"], True, num_inference_steps=4)
    assert (found - expected["iterated_0.3_0.01_steps4_clipped"]).abs().max() < 1e-5


def test_levels_that_are_not_known_or_wrong(tmp_path: Path) -> None:
    config = json.loads((REFERENCE / "config.json").read_text())
    del config["sample_noise_level"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = (REFERENCE / "model.safetensors", tmp_path / "config.json", tmp_path / "pipeline")
    with pytest.raises(ValueError, match="give it by --noise-std"):
        convert_checkpoint(*given)
    with pytest.raises(ValueError, match=r"0 < low < high, got \[0\.4, 0\.3\]"):
        convert_checkpoint(*given, noise_std=0.3, min_noise_std=0.4)
    tarflow = REFERENCE.parent / "tarflow_uncond"
    with pytest.raises(ValueError, match="the model knows one noise level: leave it out"):
        convert_checkpoint(tarflow / "model.safetensors", tarflow / "config.json", given[2], min_noise_std=0.1)
    assert not given[2].exists()


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    tarflow = REFERENCE.parent / "tarflow_uncond"
    with pytest.raises(ValueError, match="describes an iTARFlow model, but the checkpoint holds another one"):
        load_published(tarflow / "model.safetensors", REFERENCE / "config.json")
    with pytest.raises(ValueError, match="describes another model, but the checkpoint holds an iTARFlow one"):
        load_published(REFERENCE / "model.safetensors", tarflow / "config.json")
    state = load_file(REFERENCE / "model.safetensors")
    save_file({**state, "shared_blocks.0.proj.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors: \['shared_blocks\.0\.proj\.weight'\]"):
        load_published(tmp_path / "more.safetensors", REFERENCE / "config.json")
