"""Drawing with a pipeline whose flow is a trajectory model: its number of steps, and the steps.

Shapes: B images, C channels, h × w of the latents, N states of a trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.flows.layers.condition import parts_of
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.flows.trajectory.sampling import generate_trajectory, joint_score_denoise, transported
from tarflow.pipeline.call.callbacks import AfterStep
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.flow_pipeline import FlowPipeline, Generators
from tarflow.pipeline.call.samples import DENOISED_TOKENS, in_parts
from tarflow.pipeline.call.settings import Sampling
from tarflow.pipeline.call.steps import Conditions, Drawn, block_conditions, null_condition


def check_trained(flow: TrajectoryFlowModel, steps: int) -> None:
    """An error unless a trajectory model was trained with this number of steps."""
    if steps not in flow.config.steps:
        numbers = ", ".join(str(one) for one in flow.config.steps)
        raise ValueError(
            f"this trajectory model was trained with {numbers} steps: num_inference_steps cannot be {steps}"
        )


def trajectory_steps(
    pipe: FlowPipeline,
    steps: int | None,
    decoding: Any,
    denoise: bool | str | None,
    guidance: Guidance | None = None,
) -> int | None:
    """How many steps a call takes along a trajectory; None for a flow, which inverts its blocks (its
    steps from noise level to noise level are another thing).

    Args:
        pipe: the pipeline.
        steps: ``num_inference_steps`` of the call.
        decoding, denoise: of the call.
        guidance: of the call.

    Raises:
        ValueError: for a number that this model cannot take, or what trajectory models do not have.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {steps!r}")
    flow = pipe.flow
    if not isinstance(flow, TrajectoryFlowModel):
        return None
    if decoding == STUDENT:
        raise ValueError("a trajectory model has no student: leave decoding='student' out")
    if denoise == "learned":
        raise ValueError("a trajectory model has no learned denoiser; denoise=True is the score step")
    if guidance is not None:
        given = {"attention_temperature": (guidance.temperature, 1), "guidance_blocks": (guidance.blocks, "all")}
        for name, (value, usual) in given.items():
            if value != usual:
                raise ValueError(f"{name} is for flows, not for trajectory models, got {value!r}: leave it out")
    if steps is None and pipe.config.num_inference_steps > 1:
        steps = pipe.config.num_inference_steps
    if steps is None:
        return int(flow.config.steps[0])
    check_trained(flow, steps)
    return int(steps)


def draw_by_trajectory(
    pipe: FlowPipeline, call: Sampling, conditions: Conditions, noise: Tensor, generator: Generators
) -> Drawn:
    """Noise (B, C, h, w), the trajectory's first state, through all steps of the predictor and one inverse of the
    transporter; with the score step of the whole trajectory if the call removes noise."""
    flow = cast(TrajectoryFlowModel, pipe.flow)
    condition, null = (parts_of(one)[0] for one in block_conditions(pipe, call, conditions))
    tokens = noise.shape[2] * noise.shape[3] // flow.config.patch_size**2
    levels = flow.levels(call.num_steps or 0, pipe.config.noise_std, tokens)
    shape, steps = tuple(noise.shape), len(levels) - 1
    draws = [randn_tensor(shape, generator=generator, device=noise.device, dtype=noise.dtype) for _ in range(steps)]
    draws = [noise, *(call.step_temperature * draw for draw in draws)]
    with pipe.progress_bar(total=steps) as progress:
        after_step = AfterStep(pipe, progress, call, flow, lambda: null_condition(pipe, call, conditions))
        pipe.run_offload_hook(flow)
        states = generate_trajectory(flow, draws, levels, condition, null, call.guidance, after_step)
    pipe.run_offload_hook(flow)
    assert call.decoding is not None
    levels = levels[: len(states)]
    at_end = flow.at_level(levels[-1], len(noise))
    methods, timed = pipe.resolve_decoding(call.decoding, states[-1], at_end, None, Guidance(0.0))
    x = transported(flow, states[-1], levels[-1], methods, pipe.usable_fast_steps(), timed)
    latents, removes = x / (1 - levels[-1]), bool(call.denoise) and pipe.config.noise_std > 0
    if removes and not after_step.stopped:
        latents = refined(flow, [*states[1:-1]], noise, x, levels, condition)
    return Drawn(latents, x, None, None, Guidance(0.0), after_step.stopped, states[-1], removes)


def refined(
    flow: TrajectoryFlowModel,
    between: Sequence[Tensor],
    first: Tensor,
    last: Tensor,
    levels: Sequence[float],
    condition: Tensor | None,
) -> Tensor:
    """Latents (B, C, h, w) without noise, by `joint_score_denoise`, in parts that bound the memory.

    Args:
        between: u of the states between the first and the last, whose inverses are computed all at once.
        first, last: x of these, (B, C, h, w).
        levels: of all states.
        condition: of ``flow.condition``.
    """
    count = len(levels)

    def part(first: Tensor, last: Tensor, condition: Tensor | None, *between: Tensor) -> Tensor:
        states = [first, last]
        if between:
            rows = last.new_tensor(levels[1:-1]).repeat_interleave(len(last))
            states[1:1] = transported(flow, torch.cat(between), rows).chunk(len(between))
        return joint_score_denoise(flow, torch.stack(states, dim=1), levels, condition)

    tokens = last.shape[2] * last.shape[3] // flow.config.patch_size**2
    return in_parts(part, max(1, DENOISED_TOKENS // (tokens * count)), (first, last, condition, *between))
