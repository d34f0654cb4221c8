"""How near a student comes to the flow's exact inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.decoding import sampling
from tarflow.flows.decoding.method import guided_states
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.call.flow_pipeline import FlowPipeline


@dataclass(frozen=True)
class ExactSamples:
    """What a flow makes of noise, which a student is measured by.

    Attributes:
        noise: z (B, C, h, w).
        class_labels, cond: class indices (B,) or encoded captions (B, L, E) of a conditional model.
        conditions: condition, null condition and guidance, as `tarflow.flows.decoding.sampling.generate` takes them.
        states: what `exact_states` gives.
    """

    noise: Tensor
    class_labels: Tensor | None
    cond: Tensor | None
    conditions: tuple[Condition, Condition, Guidance]
    states: list[Tensor]

    @property
    def guidance_weight(self) -> float:
        """w of the samples."""
        return float(self.conditions[2].weight)

    def errors(self, flow: TARFlowModel, x: Tensor) -> list[float]:
        """`block_errors` of a student's samples of the same noise, with the training noise."""
        return block_errors(flow, x, self.states, *self.conditions)


@torch.no_grad()
def exact_samples(
    pipe: FlowPipeline, arguments: dict[str, Any], count: int, scale: float, method: str, seed: int
) -> ExactSamples:
    """Draw with a pipeline's flow, token after token.

    Args:
        arguments: of a pipeline's call: "prompt" or "class_labels" (indices), ``count`` of them, or neither.
        scale, method: of the guidance.
        seed: of the noise.
    """
    flow, device = pipe.flow, pipe.flow.device
    noise = torch.randn(count, *pipe.latent_shape(None, None), generator=torch.Generator().manual_seed(seed))
    z = flow.scale_noise(noise.to(device))
    labels = cond = null = None
    if "prompt" in arguments:
        cond, null = pipe.encode_prompt(arguments["prompt"], device)
    elif "class_labels" in arguments:
        labels = torch.tensor(arguments["class_labels"], device=device)
    guidance = Guidance(scale - 1, method)
    null_condition = flow.condition(None, null, count, pipe.drawing_level) if guidance.active else None
    conditions = flow.condition(labels, cond, count, pipe.drawing_level), null_condition, guidance
    return ExactSamples(z, labels, cond, conditions, exact_states(flow, z, *conditions))


@torch.no_grad()
def exact_states(
    flow: TARFlowModel, z: Tensor, condition: Condition, null_condition: Condition, guidance: Guidance | None
) -> list[Tensor]:
    """The states of exact sequential decoding: the sample itself, then the outputs of the blocks from data to noise, z
    last; (B, C, H, W) each.

    Args:
        flow: a `TARFlowModel`.
        z: noise (B, C, H, W).
        condition, null_condition, guidance: see `tarflow.flows.decoding.sampling.generate`.
    """
    states = [z]

    def remember(place: int, tokens: Tensor) -> None:
        states.append(tokens)

    sampling.generate(flow, z, condition, null_condition, guidance, callback=remember)
    return states[::-1]


@torch.no_grad()
def block_errors(
    flow: TARFlowModel,
    x: Tensor,
    exact: list[Tensor],
    condition: Condition,
    null_condition: Condition,
    guidance: Guidance | None,
) -> list[float]:
    """Mean absolute differences between a student's samples and exact ones, before the first block and after each, when
    both go through the flow; the last is mean |f(x) − z|.

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
