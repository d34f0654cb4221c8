"""What the options of a call can be, by the names that users type: in Python, in settings, on the command line and on the
page alike. Apart from what computes, whose libraries take seconds to import."""

from __future__ import annotations

from typing import Literal, get_args

#: How the training noise is removed before decoding: not, by one score step, or by a learned denoiser.
DenoiseName = Literal["none", "score", "learned"]
#: False is "none", True is "score".
Denoise = bool | DenoiseName
#: What decodes latents; "finetuned" takes noisy ones.
Decoder = Literal["vae", "finetuned"]
#: How noise becomes latents: by inverting the flow, or by one pass of the pipeline's student.
DecodingName = Literal["auto", "sequential", "fast", "jacobi", "gs_jacobi", "student"]
#: Those that invert the flow.
FlowDecodingName = Literal["auto", "sequential", "fast", "jacobi", "gs_jacobi"]

#: How a flow of many noise levels goes from one to the next: Euler's steps, or with fresh noise at each level.
Walk = Literal["ode", "sde"]

#: A call's ``decoding`` that is one pass of the pipeline's student.
STUDENT: Literal["student"] = "student"
DECODINGS: tuple[DecodingName, ...] = get_args(DecodingName)
DENOISE: tuple[DenoiseName, ...] = get_args(DenoiseName)
WALKS: tuple[Walk, ...] = get_args(Walk)
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
#: Ways from noisy latents to pictures by their names for users: ``denoise`` and ``decoder`` of a pipeline's call.
NOISE_REMOVALS: dict[str, tuple[Denoise, Decoder]] = {
    "none": (False, "vae"),
    "score": (True, "vae"),
    "learned": ("learned", "vae"),
    "finetuned": (False, "finetuned"),
}
