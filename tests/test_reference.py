"""Agreement with tensors that the published TARFlow and STARFlow code computed.

Six models are in `tests/reference`. Two more and the training runs are too large for the repository; they are checked
where they lie beside it, and skipped elsewhere. The published learned denoiser is not part of `TARFlowModel`, so its
outputs are left out.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED
from safetensors.torch import load_file
from torch import Tensor

from tarflow.flows.conversion import convert_state_dict, is_starflow, starflow_arguments, tarflow_arguments
from tarflow.flows.denoising import score_denoise
from tarflow.flows.guidance import Guidance
from tarflow.flows.likelihood import flow_loss, log_prob, nats_per_dim
from tarflow.flows.model import TARFlowModel

HERE = Path(__file__).parent / "reference"
TARFLOW = ("tarflow_class", "tarflow_uncond", "tarflow_volume_preserving")
STARFLOW = ("starflow_class", "starflow_denoiser", "starflow_gqa_swiglu", "starflow_no_sos", "starflow_text")
INPUTS = {"x", "cond", "null_cond", "class_labels", "class_labels_dropped", "prior_noise", "image_uint8"}
INPUTS |= {"dequantization_noise"}
DENOISER = ("denoiser_output", "denoised_sigma")
SAMPLE_TOLERANCE, TOLERANCE = 1e-4, 1e-5


def folder_of(name: str) -> Path:
    """Where a model's files are; skips the test if nowhere."""
    for folder in (HERE / name, SHARED / "reference" / name):
        if folder.is_dir():
            return folder
    pytest.skip(f"the reference tensors of {name} are not here")


def read_state(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """The published state dict, from either file format."""
    if (folder / f"{stem}.safetensors").exists():
        return load_file(folder / f"{stem}.safetensors")
    return torch.load(folder / f"{stem}.pth", weights_only=True)


def convert(state: dict[str, Tensor], config: dict[str, Any]) -> TARFlowModel:
    """Our model with the published weights; every tensor has its place."""
    arguments = starflow_arguments(config) if is_starflow(config) else tarflow_arguments(config)
    model = TARFlowModel(**arguments)
    model.load_state_dict(convert_state_dict(state, config), strict=True)
    return model.eval()


def load(name: str) -> tuple[TARFlowModel, dict[str, Tensor]]:
    folder = folder_of(name)
    config = json.loads((folder / "config.json").read_text())
    return convert(read_state(folder), config["model"]), load_file(folder / "expected.safetensors")


def check(ours: dict[str, Tensor], expected: dict[str, Tensor], ignored: tuple[str, ...] = ()) -> None:
    """Compare all, and see that nothing expected was left unchecked."""
    for name, value in ours.items():
        difference = (value.detach() - expected[name]).abs().max()
        assert value.shape == expected[name].shape, name
        scale = expected[name].abs().max().clamp(min=1e-6)
        limit = SAMPLE_TOLERANCE if name.startswith("sample") else TOLERANCE * scale
        assert difference <= limit, f"{name} differs by {difference:.1e}, more than {limit:.1e}"
    left = {name for name in expected if re.sub(r"_\d+x\d+$", "", name) not in INPUTS}
    left = {name for name in left - ours.keys() if not name.startswith(ignored or ("nothing",))}
    assert not left, "not compared"


@pytest.mark.parametrize("name", TARFLOW)
def test_tarflow(name: str) -> None:
    model, expected = load(name)
    x, labels = expected["x"], expected.get("class_labels")
    grid = (model.config.sample_size // model.config.patch_size,) * 2
    ours: dict[str, Tensor] = {}
    with torch.no_grad():
        z, log_det, outputs = model(x, labels, return_block_outputs=True)
        ours["z"], ours["logdet_per_dim"], ours["loss"] = (
            patches(model, z),
            log_det / z[0].numel(),
            flow_loss(z, log_det),
        )
        ours |= {f"block_output_{i}": patches(model, output) for i, output in enumerate(outputs)}
        if labels is not None:
            dropped = expected["class_labels_dropped"]
            z, log_det = model(x, torch.where(dropped < 0, model.null_label, dropped))
            ours["z_dropped"], ours["logdet_per_dim_dropped"] = patches(model, z), log_det / z[0].numel()
        if "nll_nats_per_dim_minus1_1" in expected:
            pixels = (expected["image_uint8"].float() + expected["dequantization_noise"]) / 256 * 2 - 1
            nats = nats_per_dim(log_prob(model, pixels), pixels[0].numel())
            ours["nll_nats_per_dim_minus1_1"], ours["bits_per_dim_uint8"] = nats, (nats + math.log(128)) / math.log(2)
        noise = model.scale_noise(model.unpatchify(expected["prior_noise"], grid))
        for key in expected:
            found = re.fullmatch(r"sample_guidance([\d.]+?)(?:_(ab|a|b))?(?:_attn_temp([\d.]+))?(_annealed)?", key)
            if found:
                weight, parts, temperature, annealed = found.groups()
                guidance = Guidance(float(weight), "linear", parts or "ab", bool(annealed), float(temperature or 1))
                ours[key], _ = model.inverse(noise, labels, guidance=guidance)
    ours["score_denoised_sigma0.1"] = score_denoise(model, x, 0.1, labels)
    check(ours, expected)


def patches(model: TARFlowModel, images: Tensor) -> Tensor:
    """Tokens of images, as the published TARFlow code gives them."""
    return model.patchify(images)[0]


@pytest.mark.parametrize("name", STARFLOW)
def test_starflow(name: str) -> None:
    model, expected = load(name)
    ours: dict[str, Tensor] = {}
    suffixes = {match[0] if (match := re.search(r"_\d+x\d+$", key)) else "" for key in expected}
    for suffix in sorted(suffixes):
        x, cond = expected["x" + suffix], expected["cond" + suffix]
        condition, null = {"cond": cond}, {"null_cond": expected["null_cond" + suffix]}
        if model.config.conditioning == "class_prefix":
            labels = expected["class_labels"]
            assert torch.equal(model.condition(labels, None, len(x)), cond)
            assert torch.equal(model.condition(None, None, len(x)), null["null_cond"])
            condition, null = {"class_labels": labels}, {}
        with torch.no_grad():
            z, log_det = model(x, **condition)
            ours["z" + suffix], ours["logdet_per_dim" + suffix] = z, log_det / z[0].numel()
            ours["loss" + suffix], ours["loss_z" + suffix] = flow_loss(z, log_det), 0.5 * z.pow(2).mean()
            ours["loss_logdet" + suffix] = -log_det.mean() / z[0].numel()
            for key in expected:
                if found := re.fullmatch(r"sample_guidance([\d.]+?)" + suffix, key):
                    guidance = Guidance(float(found[1]))
                    ours[key], _ = model.inverse(
                        expected["prior_noise" + suffix], **condition, **null, guidance=guidance
                    )
        ours["score_denoised_sigma0.3" + suffix] = score_denoise(model, x, 0.3, **condition)
    check(ours, expected, DENOISER)


@pytest.mark.parametrize("name", ["tarflow_class", "starflow_class"])
def test_training_has_the_published_losses(name: str) -> None:
    """200 optimizer steps from the same weights on the same data."""
    folder = SHARED / "reference" / "training" / name
    if not folder.is_dir():
        pytest.skip(f"the reference training run of {name} is not here")
    config = json.loads((folder / "config.json").read_text())
    run, optimizer = load_file(folder / "run.safetensors"), config["optimizer"]
    model = convert(read_state(folder, "initial"), config["model"]).train()
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
    model, _ = load("starflow_gqa_swiglu")
    state, x = read_state(folder_of("starflow_gqa_swiglu")), torch.randn(3, 64)
    mlp, prefix = model.blocks[1].layers[0].mlp, "blocks.1.attn_blocks.0.mlp."
    gate, up = (state[f"{prefix}{part}_proj.weight"] for part in ("gate", "up"))
    assert len(gate) == model.config.width * model.config.mlp_ratio
    torch.testing.assert_close(mlp.up(x), torch.cat([x @ gate.T, x @ up.T], 1))
    hidden = F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)
    torch.testing.assert_close(mlp.down(hidden), hidden @ state[f"{prefix}down_proj.weight"].T)


def test_blocks_without_layers_are_left_out() -> None:
    folder = folder_of("starflow_class")
    config, state = json.loads((folder / "config.json").read_text())["model"], read_state(folder)
    moved = {name.replace("blocks.2.", "blocks.4."): value for name, value in state.items()}
    config = {**config, "num_blocks": 5, "layers_per_block": [2, 1, 0, 0, 2]}
    model = convert(moved, config)
    assert [block.config.order for block in model.blocks] == ["row_major", "reversed", "row_major"]
    assert torch.equal(model.blocks[2].proj_in.weight, state["blocks.2.proj_in.weight"])


def test_tensors_that_do_not_fit_are_listed() -> None:
    folder = folder_of("starflow_gqa_swiglu")
    config, state = json.loads((folder / "config.json").read_text())["model"], read_state(folder)
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
    folder = folder_of("tarflow_uncond")
    config, state = json.loads((folder / "config.json").read_text())["model"], read_state(folder)
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
