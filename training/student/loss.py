"""What a student is taught, as pure functions.

Shapes: B batch, C channels, H × W size of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow.flows.decoding.method import guided_states
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel


def teacher_states(
    flow: TARFlowModel,
    x: Tensor,
    condition: Condition,
    null_condition: Condition,
    weight: Tensor | None,
    method: str,
) -> list[Tensor]:
    """The flow's states from noise to data: z, the outputs of the blocks before it, and ``x`` itself, (B, C, H, W)
    each. It takes one parallel pass; nothing is drawn.

    Args:
        flow: the trained `TARFlowModel`.
        x: data with the training noise (B, C, H, W).
        condition, null_condition: as `TARFlowModel.condition` gives them.
        weight: guidance weights (B,) of the guided map; None for the plain one.
        method: of the guidance.
    """
    guidance = None if weight is None else Guidance(weight[:, None, None], method)
    grid = flow.patchify(x)[1]
    states = guided_states(flow, x, condition, null_condition, guidance)
    return [*(flow.unpatchify(state, grid) for state in reversed(states)), x]


def alignment_loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean squared error of what is read of the flow's states, averaged over them, a number ("hidden alignment", BiFlow).

    Args:
        found, wanted: (B, C, H, W) each, as many of the one as of the other.
    """
    errors = [(one - other).pow(2).mean() for one, other in zip(found, wanted, strict=True)]
    return torch.stack(errors).mean()


def extrapolated(x: Tensor, unconditional: Tensor, weight: Tensor) -> Tensor:
    """x + w·(x − x_u): a guided sample as classifier-free guidance of one-pass networks has it, from a sample with and
    one without the condition.

    Args:
        x: latents (B, C, H, W).
        unconditional: what the student makes of the same noise without the condition.
        weight: w (B,).
    """
    return x + weight[:, None, None, None] * (x - unconditional)
