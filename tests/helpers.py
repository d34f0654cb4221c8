"""Small models and their conditions, for many tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.layers.scattered import SCATTERED, scattered
from tarflow.flows.model import TARFlowModel

ROOT = Path(__file__).parents[1]
#: Data that is not part of the repository; tests that need it are skipped without it.
SHARED = ROOT.parent / "shared"

NUM_CLASSES, COND_DIM, PREFIX_LENGTH = 3, 5, 3


def fresh_process() -> None:
    """Forget Accelerate's states, as a process has none at its start."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def perturb(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Add noise to all parameters: the output layers start at zero, so a fresh model is the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model


def small_model(**changes: Any) -> TARFlowModel:
    """A perturbed model of two blocks on 2 × 4 × 4 numbers, four tokens of eight."""
    arguments: dict[str, Any] = {
        "in_channels": 2,
        "sample_size": 4,
        "patch_size": 2,
        "layers_per_block": (1, 2),
        "width": 64,
        "head_dim": 32,
        "num_classes": NUM_CLASSES,
        "cond_dim": COND_DIM,
    }
    model = TARFlowModel(**{**arguments, **changes})
    perturb(model)
    return model.eval()


def condition_of(model: TARFlowModel, batch: int) -> dict[str, Tensor]:
    """Random keyword arguments that the model's conditioning wants; the last of several labels is "no class"."""
    weight = model.blocks[0].proj_in.weight
    if model.config.conditioning.startswith("class"):
        labels = torch.arange(batch) % model.config.num_classes
        if batch > 1:
            labels[-1] = model.null_label
        return {"class_labels": labels}
    if model.config.conditioning == "prefix":
        return {"cond": torch.randn(batch, PREFIX_LENGTH, model.config.cond_dim, dtype=weight.dtype)}
    return {}


def random_images(model: TARFlowModel, batch: int, height: int = 0, width: int = 0) -> Tensor:
    """Normal numbers (B, C, H, W) in the model's dtype; its own size unless another is given."""
    size = model.config.sample_size
    shape = (batch, model.config.in_channels, height or size, width or size)
    return torch.randn(shape, dtype=model.blocks[0].proj_in.weight.dtype)


def scattered_inputs(block: FlowBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the slots of a block in a scattered order hold, number by number, of tokens (T, C) in its order."""
    order, start = scattered(block.config.order, grid), block.start_token.to(x.dtype)
    made: dict[tuple[int, int], Tensor] = {}
    rows, last = [], start
    for token, (row, column) in zip(x, order, strict=True):
        spacing = 1
        while made and row % (2 * spacing) == column % (2 * spacing) == 0:
            spacing *= 2
        around = [(0, -1), (0, 1), (-1, 0), (1, 0)]
        if row % (2 * spacing) and column % (2 * spacing):
            around = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
        if block.config.order == "outward":
            spacing, around = 1, [(0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
            around += [(0, -2), (0, 2), (-2, 0), (2, 0)]
        near = [made.get((row + spacing * down, column + spacing * right), start) for down, right in around]
        rows.append(torch.cat([last, *near]))
        made[row, column] = last = token
    return torch.stack(rows)


def block_parameters(
    block: FlowBlock, x: Tensor, grid: tuple[int, int], cond: Tensor | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Shift and scale σ of all tokens in one parallel pass without a cache, (B, T, C) each, in the block's order.

    ``x`` is in the block's order too. It is the definition that cached decoding is compared with.
    """
    divisor = None if temperature == 1 else torch.full((x.shape[0], 1, 1, 1), temperature, dtype=x.dtype)
    context = block.context(cond, grid)
    if block.config.order in SCATTERED:
        inputs = torch.stack([scattered_inputs(block, one, grid) for one in x])
        shift, log_scale = block.affine_parameters(inputs, 0, context, None, divisor)
        return shift, log_scale.exp()
    if block.start_token is not None:
        start = block.start_token.to(x.dtype).expand(x.shape[0], 1, -1)
        shift, log_scale = block.affine_parameters(torch.cat([start, x[:, :-1]], 1), 0, context, None, divisor)
        return shift, log_scale.exp()
    shift, log_scale = block.affine_parameters(x[:, :-1], 0, context, None, divisor)
    zero = torch.zeros_like(x[:, :1])
    return torch.cat([zero, shift], 1), torch.cat([zero, log_scale], 1).exp()


def jacobian(function: Any, x: Tensor) -> Tensor:
    """d function(x) / dx with both flattened."""
    return torch.autograd.functional.jacobian(function, x, vectorize=True).reshape(x.numel(), x.numel())


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
