"""Agreement with tensors that the published TARFlow, STARFlow and iTARFlow code computed.

Seven models are in `tests/reference`. Three more and the training runs are too large for the repository; they are checked
where they lie beside it, and skipped elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, SHARED
from safetensors.torch import load_file, save_file
from torch import Tensor

from tarflow.benchmarks.reference import check_folder
from tarflow.flows.conversion import convert_state_dict, model_arguments, starflow_arguments, tarflow_arguments
from tarflow.flows.likelihood import flow_loss
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.conversion import load_published, read_tensors

HERE = ROOT / "tests" / "reference"
NAMES = ("tarflow_class", "tarflow_uncond", "tarflow_volume_preserving", "starflow_class", "starflow_denoiser")
NAMES += ("starflow_gqa_swiglu", "starflow_no_sos", "starflow_text", "itarflow_class", "itarflow_uncond")


def folder_of(name: str) -> Path:
    """Where a model's files are; skips the test if nowhere."""
    for folder in (HERE / name, SHARED / "reference" / name):
        if folder.is_dir():
            return folder
    pytest.skip(f"the reference tensors of {name} are not here")


def load(name: str) -> tuple[TARFlowModel, dict[str, Any], dict[str, Tensor]]:
    """Our model with published weights, the published arguments and state dict."""
    folder = folder_of(name)
    checkpoint = next(path for path in folder.iterdir() if path.stem == "model")
    model, arguments = load_published(checkpoint, folder / "config.json")
    return model, arguments, read_tensors(checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_reproduced(name: str) -> None:
    comparisons = check_folder(folder_of(name))
    assert len(comparisons) > 5
    assert not [comparison for comparison in comparisons if not comparison.passed]


def test_a_wrong_or_missing_tensor_is_seen(tmp_path: Path) -> None:
    folder = folder_of("tarflow_volume_preserving")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = load_file(folder / "expected.safetensors")
    expected["loss"] = expected["loss"] * (1 + 3e-5)
    expected["sample_of_another_kind"] = torch.zeros(2)
    save_file(expected, tmp_path / "expected.safetensors")
    failed = {comparison.name for comparison in check_folder(tmp_path) if not comparison.passed}
    assert failed == {"loss", "sample_of_another_kind"}


@pytest.mark.parametrize("name", ["tarflow_class", "starflow_class"])
def test_training_has_the_published_losses(name: str) -> None:
    """200 optimizer steps from the same weights on the same data."""
    folder = SHARED / "reference" / "training" / name
    if not folder.is_dir():
        pytest.skip(f"the reference training run of {name} is not here")
    config = json.loads((folder / "config.json").read_text())
    run, optimizer = load_file(folder / "run.safetensors"), config["optimizer"]
    model = TARFlowModel(**model_arguments(config["model"])).train()
    model.load_state_dict(convert_state_dict(read_tensors(folder / "initial.pth"), config["model"]))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer["lr"],
        betas=tuple(optimizer["betas"]),
        eps=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
    )
    losses = []
    for x, labels in zip(run["x"], run["class_labels"], strict=True):
        loss = flow_loss(*model(x, torch.where(labels < 0, model.null_label, labels)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == config["steps"]
    assert (torch.tensor(losses) - run["losses"]).abs().max() <= 1e-6


def test_a_gated_layer_is_gate_and_up() -> None:
    model, _, state = load("starflow_gqa_swiglu")
    x = torch.randn(3, 64)
    mlp, prefix = model.blocks[1].layers[0].mlp, "blocks.1.attn_blocks.0.mlp."
    gate, up = (state[f"{prefix}{part}_proj.weight"] for part in ("gate", "up"))
    assert len(gate) == model.config.width * model.config.mlp_ratio
    torch.testing.assert_close(mlp.up(x), torch.cat([x @ gate.T, x @ up.T], 1))
    hidden = F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)
    torch.testing.assert_close(mlp.down(hidden), hidden @ state[f"{prefix}down_proj.weight"].T)


def test_blocks_without_layers_are_left_out() -> None:
    _, config, state = load("starflow_class")
    moved = {name.replace("blocks.2.", "blocks.4."): value for name, value in state.items()}
    config = {**config, "num_blocks": 5, "layers_per_block": [2, 1, 0, 0, 2]}
    model = TARFlowModel(**model_arguments(config))
    model.load_state_dict(convert_state_dict(moved, config))
    assert [block.config.order for block in model.blocks] == ["row_major", "reversed", "row_major"]
    assert torch.equal(model.blocks[2].proj_in.weight, state["blocks.2.proj_in.weight"])


def test_tensors_that_do_not_fit_are_listed() -> None:
    _, config, state = load("starflow_gqa_swiglu")
    state["blocks.7.proj_in.weight"] = torch.zeros(1)
    state["blocks.0.attn_blocks.0.extra.weight"] = torch.zeros(1)
    state["blocks.0.proj_in.bias"] = torch.zeros(3)
    del state["blocks.1.proj_out.bias"], state["blocks.1.attn_blocks.1.mlp.gate_proj.weight"]
    with pytest.raises(ValueError) as caught:
        convert_state_dict(state, config)
    missing, unexpected, wrong = str(caught.value).split(";")
    assert missing == "missing tensors: ['blocks.1.layers.1.mlp.up.weight', 'blocks.1.proj_out.bias']"
    assert "'blocks.7.proj_in.weight'" in unexpected
    assert "'blocks.0.attn_blocks.0.extra.weight'" in unexpected
    assert "blocks.0.proj_in.bias (3,) instead of (64,)" in wrong


def test_a_prior_variance_is_not_lost() -> None:
    _, config, state = load("tarflow_uncond")
    state["var"] = torch.ones(16, 27)
    assert "prior_variance" not in convert_state_dict(state, config)
    with pytest.raises(ValueError, match=r"unexpected tensors: \['var'\]"):
        convert_state_dict({**state, "var": 2 * state["var"]}, config)


def test_wrong_arguments_are_listed() -> None:
    config = json.loads((folder_of("tarflow_uncond") / "config.json").read_text())["model"]
    with pytest.raises(ValueError, match=r"lack \['img_size'\] and have unknown \['size'\]"):
        tarflow_arguments({**{key: value for key, value in config.items() if key != "img_size"}, "size": 12})
    with pytest.raises(ValueError, match="lists 3 blocks, but num_blocks is 2"):
        tarflow_arguments({**config, "layers_per_block": [1, 1, 1]})
    config = json.loads((folder_of("starflow_text") / "config.json").read_text())["model"]
    with pytest.raises(ValueError, match="'R2L' or 'L2R', got 'up'"):
        starflow_arguments({**config, "seq_order": "up"})
    assert starflow_arguments({**config, "txt_size": 0})["conditioning"] == "none"
    assert starflow_arguments({**config, "rope": False})["positions"] == "learned"
    assert starflow_arguments({**config, "nvp": False})["scale"] == "additive"
