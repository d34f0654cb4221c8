"""Shipped configurations: valid, and of the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import ROOT

from tarflow.flows.model import TARFlowModel
from tarflow.training.flow.arguments import parse_config

OTHERS = ("vae_", "fid_", "decoder", "student_")
TRAINING = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith(OTHERS))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_is_valid(path: Path) -> None:
    config, _ = parse_config(["--config", str(path)])
    assert config.output == f"runs/{path.stem}" or path.stem.startswith("quickstart")


def transformer_size(layers: int, width: int) -> int:
    """Parameters of pre-norm layers with biases, expansion 4 and LayerNorm."""
    sizes = ((1, 3), (1, 1), (1, 4), (4, 1))  # qkv, proj, up, down, in widths
    linear = sum(n_in * n_out * width**2 + n_out * width for n_in, n_out in sizes)
    return layers * (linear + 4 * width)


def tarflow_size(tokens: int, token_dim: int, width: int, classes: int) -> int:
    """Eight blocks of eight layers with learned positions and class vectors."""
    block = transformer_size(8, width) + (token_dim * width + width) + (width * 2 * token_dim + 2 * token_dim)
    return 8 * (block + tokens * width + classes * width)


def starflow_size(deep_layers: int, width: int, cond_dim: int) -> int:
    """Five blocks of two layers and a deep one that sees the condition, on four-channel tokens, with start tokens."""
    ends = (4 * width + width) + (width * 8 + 8) + 4 + width  # input, output, start token, final norm
    return transformer_size(10 + deep_layers, width) + 6 * ends + (cond_dim * width + width)


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [
        ("tarflow_imagenet64", tarflow_size(32**2, 12, 768, 1000), 0.46),
        ("tarflow_imagenet64_bpd", tarflow_size(32**2, 12, 768, 0), 0.46),
        ("tarflow_imagenet128", tarflow_size(32**2, 48, 1024, 1000), 0.82),
        ("tarflow_afhq256", tarflow_size(32**2, 192, 768, 3), 0.46),
        ("starflow_imagenet256", starflow_size(18, 2048, 1001), 1.4),
        ("starflow_t2i256", starflow_size(24, 3072, 2048), 3.9),
    ],
)
def test_published_sizes(name: str, size: int, billions: float) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config, _ = parse_config(["--config", str(path)])
    with torch.device("meta"):
        model = TARFlowModel(**config.flow)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == size
    assert count == pytest.approx(billions * 1e9, rel=0.03)
    if name != "tarflow_imagenet64_bpd":  # the others' first lines name the size
        assert f"{count / 1e9:.{1 if billions > 1 else 2}f} billion" in path.read_text().splitlines()[0]
