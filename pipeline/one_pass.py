"""Drawing with a pipeline's student: what it can do of what a call asks for, and its one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tarflow.flows.guidance import Guidance
from tarflow.vae.codec import tensors_hash

#: What a call's ``decoding`` is called then.
STUDENT = "student"


def check_call(pipe: Any, scale: float, guidance: Guidance, negative: bool) -> None:
    """Whether the pipeline's student can stand in for its flow in a call.

    Args:
        pipe: the pipeline, with a student.
        scale: the call's guidance scale.
        guidance: the same with its method.
        negative: a negative prompt was given.

    Raises:
        ValueError: if the student is of another flow, or was not trained for such guidance.
    """
    pipe.check_student()
    student = pipe.student
    largest = student.config.max_guidance_scale
    if scale > largest:
        trained = "without guidance" if largest == 1 else f"with guidance scales from 1 to {largest:g}"
        raise ValueError(
            f"guidance_scale is {scale:g}, but this student was trained {trained}: take a scale in that range, or "
            "another decoding"
        )
    if scale == 1:
        return
    plain = Guidance(guidance.weight, student.config.guidance_method)
    if guidance != plain:
        raise ValueError(
            f"this student knows the guidance method {plain.method!r} alone, with both parts, not annealed, and an "
            "attention temperature of 1: leave the others out, or take another decoding"
        )
    if negative:
        raise ValueError("a student has learned guidance away from no condition: leave negative_prompt out")


def noise_left(pipe: Any, denoise: bool | str | None, decoder: str | None) -> bool:
    """Whether a student's latents still have the training noise; if not, nothing can remove it again.

    Raises:
        ValueError: if there is no student, or more is asked for.
    """
    if pipe.student is None:
        raise ValueError(
            "this pipeline has no student: train one with train_student.py --pipeline FOLDER, or take another decoding"
        )
    if pipe.student.config.target == "noisy":
        return True
    if denoise or decoder == "finetuned":
        asked = f"denoise={denoise!r}" if denoise else "decoder='finetuned'"
        raise ValueError(f"this student's latents have no noise left to remove: leave {asked} out")
    return False


def draw(
    student: Any,
    noise: Tensor,
    class_labels: Tensor | None,
    cond: Tensor | None,
    weight: float,
    compiled: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A student's samples, (B, C, h, w): its latents, and those with the training noise, by which it can be measured
    (the former again, if it was not taught the latter).

    Args:
        student: the `StudentModel`.
        noise: (B, C, h, w).
        class_labels, cond: indices (B,) or encoded captions (B, L, E) of a conditional model.
        weight: guidance scale − 1.
        compiled: what `torch.compile` made of the student, if anything.
    """
    dtype = student.proj_in.weight.dtype
    weights = torch.full((len(noise),), weight, device=noise.device)  # a tensor: compiled once for all weights
    network = student if compiled is None else compiled
    x, states = network(noise.to(dtype), class_labels, cond, weights, return_states=True)
    return x, (states[-1] if student.config.target == "clean" and states else x)


def flow_hashes(flow: nn.Module) -> tuple[str, ...]:
    """SHA-256 of a flow's parameters: as they are, and as they are after storage in float16 and bfloat16, so that a
    student still knows its flow from a smaller file."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(tensors_hash(flow.named_parameters(), dtype) for dtype in dtypes)


def check_flow(student: Any, flow: nn.Module) -> None:
    """An error unless ``student`` was trained for this very flow."""
    found = tensors_hash(flow.named_parameters())
    if found not in student.config.flow_hashes:
        known = ", ".join(value[:12] for value in student.config.flow_hashes) or "none"
        raise ValueError(
            f"this student is of another flow: the weights' SHA-256 begins with {found[:12]}, and it knows {known}; train "
            "one for this pipeline with train_student.py"
        )
