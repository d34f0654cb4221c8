"""Drawing with a pipeline's student: what it can do of what a call asks for, and its one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tarflow.flows.adapters.adapters import acting_adapters, without_adapters
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.prepared import compute_dtype, held_tensors
from tarflow.flows.student import StudentModel
from tarflow.pipeline.loading.weight_files import weight_file
from tarflow.vae.codec import tensors_hash

NO_STUDENT = (
    "this pipeline has no student: train one with tarflow train-student --pipeline FOLDER, or take another decoding"
)


def check_student_scale(student: StudentModel, scale: float) -> None:
    """Whether a student knows a guidance scale.

    Raises:
        ValueError: if it was trained for smaller ones.
    """
    largest = student.config.max_guidance_scale
    if scale > largest:
        trained = "without guidance" if largest == 1 else f"with guidance scales from 1 to {largest:g}"
        raise ValueError(
            f"guidance_scale is {scale:g}, but this student was trained {trained}: take a scale in that range, or "
            "another decoding"
        )


def check_student_call(
    student: StudentModel, scale: float, guidance: Guidance, negative: bool, shape: tuple[int, int, int]
) -> None:
    """Whether a pipeline's student can stand in for its flow in a call.

    Args:
        student: of this flow, see `check_flow`.
        scale: the call's guidance scale.
        guidance: the same with its method.
        negative: a negative prompt was given.
        shape: channels, height and width of the latents.

    Raises:
        ValueError: if the student was not trained for such guidance, or its patches do not fit the size.
    """
    check_student_scale(student, scale)
    patch = student.config.patch_size
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"the latents are {shape[1]} × {shape[2]}, but this student's patches are {patch} × {patch}: take another height or "
            "width, or another decoding"
        )
    if scale == 1:
        return
    plain = Guidance(guidance.weight, student.config.guidance_method)
    if guidance != plain:
        raise ValueError(
            f"this student knows the guidance method {plain.method!r} alone, with both parts, in all blocks, not annealed, "
            "and an attention temperature of 1: leave the others out, or take another decoding"
        )
    if negative:
        raise ValueError("a student has learned guidance away from no condition: leave negative_prompt out")


def noise_left(student: StudentModel | None, denoise: bool | str | None, decoder: str | None) -> bool:
    """Whether a student's latents still have the training noise; if not, nothing can remove it again.

    Raises:
        ValueError: if there is no student, or more is asked for.
    """
    if student is None:
        raise ValueError(NO_STUDENT)
    if student.config.target == "noisy":
        return True
    removes = denoise not in (None, False, "none")
    if removes or decoder == "finetuned":
        asked = f"denoise={denoise!r}" if removes else "decoder='finetuned'"
        raise ValueError(f"this student's latents have no noise left to remove: leave {asked} out")
    return False


def student_samples(
    student: StudentModel,
    noise: Tensor,
    class_labels: Tensor | None,
    cond: Tensor | None,
    weight: float,
    compiled: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A student's samples, (B, C, h, w): its latents, and its latents with the training noise, which can be compared with
    the flow's. Both are the same for students with the target "noisy".

    Args:
        noise: (B, C, h, w).
        class_labels, cond: indices (B,) or encoded captions (B, L, E) of a conditional model.
        weight: guidance scale − 1.
        compiled: what `torch.compile` made of the student, if anything.
    """
    dtype = compute_dtype(student.proj_in)
    weights = torch.full((len(noise),), weight, device=noise.device)  # a tensor: compiled once for all weights
    network = student if compiled is None else compiled
    x, states = network(noise.to(dtype), class_labels, cond, weights, return_states=True)
    return x, (states[-1] if student.config.target == "clean" and states else x)


def flow_hashes(flow: nn.Module) -> tuple[str, ...]:
    """SHA-256 of a flow's parameters: as they are, and as they are after storage in float16 and bfloat16, and after each
    was read as the other, so that a student still knows its flow from a smaller file."""
    hashes = [tensors_hash(named_weights(flow), dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    for first, second in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        hashes.append(tensors_hash(((name, value.to(first)) for name, value in named_weights(flow)), second))
    return tuple(hashes)


def named_weights(flow: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A flow's parameters by their names in its class, also of one that is compiled or whose weights are offloaded."""
    parameters = {name for name, _ in flow.named_parameters()}
    held = ((name, value) for name, value in held_tensors(flow) if name in parameters)
    return ((name.replace("_orig_mod.", ""), value) for name, value in without_adapters(flow, held))


def stored_hashes(folder: str | None, flow: nn.Module) -> set[str]:
    """Hashes of a flow's weights in a pipeline's folder, if those of ``flow`` are these in its own dtype; else none."""
    files = sorted(Path(folder or "", "flow").glob("*.safetensors"))
    stored: dict[str, Tensor] = {}
    for file in files:
        kind = weight_file(file.name)
        if kind is not None and kind.variant is None:
            stored |= load_file(file)
    own = dict(named_weights(flow))
    if not own.keys() <= stored.keys():
        return set()
    if any(not torch.equal(stored[name].to(value.dtype), value.detach().cpu()) for name, value in own.items()):
        return set()
    return {tensors_hash((name, stored[name]) for name in own)}


def check_flow(student: StudentModel, flow: nn.Module, folder: str | None = None) -> None:
    """An error unless ``student`` was trained for this very flow.

    Args:
        folder: the pipeline's, if it was loaded from one: weights that are stored in 16 bits, and were read in others,
            are known by what is stored.
    """
    if adapters := acting_adapters(flow):
        raise ValueError(
            f"a student does not know the flow's adapters ({', '.join(adapters)}), so its pictures would be without them: "
            "take another decoding, or disable_lora() first"
        )
    found = tensors_hash(named_weights(flow))
    known = set(student.config.flow_hashes)
    if found not in known and not stored_hashes(folder, flow) & known:
        names = ", ".join(value[:12] for value in student.config.flow_hashes) or "none"
        raise ValueError(
            f"this student is of another flow: the weights' SHA-256 begins with {found[:12]}, and it knows {names}; train "
            "one for this pipeline with tarflow train-student"
        )
