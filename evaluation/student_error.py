"""How near a student comes to the flow's exact inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tarflow.flows import sampling
from tarflow.flows.decoding import guided_states
from tarflow.flows.guidance import Guidance


@torch.no_grad()
def exact_states(
    flow: Any, z: Tensor, condition: Tensor | None, null_condition: Tensor | None, guidance: Guidance | None
) -> list[Tensor]:
    """What the flow's blocks stand at when noise is inverted token after token: the sample itself, then the outputs of
    the blocks from the data to the noise, the last of them z; (B, C, H, W) each.

    Args:
        flow: a `TARFlowModel`.
        z: noise (B, C, H, W).
        condition, null_condition, guidance: see `tarflow.flows.sampling.generate`.
    """
    states = [z]
    sampling.generate(
        flow, z, condition, null_condition, guidance, callback=lambda place, tokens: states.append(tokens) or None
    )
    return states[::-1]


@torch.no_grad()
def block_errors(
    flow: Any,
    x: Tensor,
    exact: list[Tensor],
    condition: Tensor | None,
    null_condition: Tensor | None,
    guidance: Guidance | None,
) -> list[float]:
    """Mean absolute differences between where the flow takes a student's samples and where its blocks exactly stand:
    of the samples themselves, and after each block; the last is mean |f(x) − z|.

    Args:
        x: the student's samples with the training noise (B, C, H, W).
        exact: what `exact_states` gave for the same noise.
        flow, condition, null_condition, guidance: as there.
    """
    grid = flow.patchify(x)[1]
    states = [
        x,
        *(flow.unpatchify(state, grid) for state in guided_states(flow, x, condition, null_condition, guidance)),
    ]
    return [float((state - other).abs().mean()) for state, other in zip(states, exact, strict=True)]
