"""What the options of a call can be, by the names that users type; apart from what computes, whose libraries take seconds
to import."""

from __future__ import annotations

from typing import Literal

#: How the training noise is removed before decoding: not, by one score step (also "score"), or by a learned denoiser.
Denoise = bool | Literal["score", "learned"]
Decoder = Literal["vae", "finetuned"]
#: How noise becomes latents, where no segment is to be said.
DecodingName = Literal["sequential", "auto", "fast", "jacobi", "student"]

#: A call's ``decoding`` that is one pass of the pipeline's student.
STUDENT: Literal["student"] = "student"
DECODERS: tuple[Decoder, ...] = ("vae", "finetuned")
#: Ways from noisy latents to pictures by their names for users: ``denoise`` and ``decoder`` of a pipeline's call.
NOISE_REMOVALS: dict[str, tuple[Denoise, Decoder]] = {
    "none": (False, "vae"),
    "score": (True, "vae"),
    "learned": ("learned", "vae"),
    "finetuned": (False, "finetuned"),
}
