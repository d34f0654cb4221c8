"""One drawing of the page: what is asked for, whether it can be done, and the stages at which it is shown.

The pipeline runs in a thread of its own, and what becomes of it is handed over in a queue, so that the page can show each
block while the next one is computed, and can stop a run between two blocks.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tarflow.common.clock import clock
from tarflow.common.seeds import image_generators
from tarflow.flows.decoding.calibration import conditions_key
from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, FAST_TOLERANCE
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.prepared import is_elsewhere
from tarflow.pipeline.call.choices import DECODINGS, NOISE_REMOVALS, STUDENT
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.limits import check_num_images

MOST_IMAGES = 16
LONGEST_PROMPT = 1000
LARGEST_GUIDANCE = 10.0
LARGEST_SEED = 2**32 - 1
#: Down from noise level to noise level.
MOST_STEPS = 100
#: Seconds after which the page hears of a run again, also when nothing new has come.
BEAT = 0.5


class StoppedError(Exception):
    """A run was asked to stop, or nobody waits for its result any more."""


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        prompt: a caption, for text-conditioned models.
        label: index of the class, for class-conditioned ones.
        guidance_scale: 1 is off.
        decoding: one of `DECODINGS`.
        noise_removal: one of `NOISE_REMOVALS`; a student of clean latents leaves nothing to remove.
        seed: image i depends on it and i alone, as with `tarflow generate`.
        count: how many images.
        steps: in how many the score removes the noise of a flow of many levels; None is the pipeline's own default.
    """

    prompt: str | None = None
    label: int | None = None
    guidance_scale: Any = 1.0
    decoding: str = "auto"
    noise_removal: str = "score"
    seed: Any = 0
    count: Any = 1
    steps: Any = None


@dataclass(frozen=True)
class Stage:
    """All images (count of them) at one place of the way from noise to picture, and its name."""

    name: str
    images: list[Image.Image]


@dataclass(frozen=True)
class Result:
    """Of a finished run.

    Attributes:
        images: the pictures.
        residual_max, residual_mean: |f(x) − z| of each.
        seconds: that drawing took, without the time to show the stages.
        calibrated: whether "auto" had to try the methods, which is part of the time.
        decodings: of each block, in the order in which they were inverted.
    """

    images: list[Image.Image]
    residual_max: list[float]
    residual_mean: list[float]
    seconds: float
    calibrated: bool
    decodings: list[str]


@dataclass(frozen=True)
class Progress:
    """How far a run is: what there is to see, and what is done at present.

    Attributes:
        stages: so far.
        fraction: done, 0 to 1; None while it cannot be told.
        message: what is computed now.
        seconds: since the run was asked for.
        result: at the end.
    """

    stages: list[Stage] = field(default_factory=list)
    fraction: float | None = None
    message: str = "waiting for the run before this one"
    seconds: float = 0.0
    result: Result | None = None


def decodings(pipe: FlowPipeline) -> list[str]:
    """How this pipeline can make latents of noise."""
    return [name for name in DECODINGS if name != STUDENT or pipe.student is not None]


def noise_removals(pipe: FlowPipeline) -> list[str]:
    """What this pipeline can remove the training noise by, its own default first."""
    names = ["none"]
    if pipe.config.noise_std > 0:
        names.insert(0 if pipe.config.denoise else 1, "score")
        if pipe.flow.config.learned_denoiser != "none":
            names.append("learned")
        if pipe.finetuned_decoder is not None:
            names.insert(0 if pipe.config.decoder == "finetuned" else len(names), "finetuned")
    return names


def checked(pipe: FlowPipeline, request: Request) -> Request:
    """The request with plain numbers.

    Raises:
        ValueError: for what this pipeline cannot draw; one sentence for the page.
    """
    kind = pipe.flow.config.conditioning
    if kind == "prefix":
        check_prompt(request.prompt)
    if kind.startswith("class") and request.label is None:
        raise ValueError("Choose a class.")
    count = whole_number(request.count, "The number of images", 1, MOST_IMAGES)
    seed = whole_number(request.seed, "The seed", 0, LARGEST_SEED)
    scale = request.guidance_scale
    if not isinstance(scale, int | float) or not 1 <= scale <= LARGEST_GUIDANCE:
        raise ValueError(f"The guidance scale must be a number from 1 (off) to {LARGEST_GUIDANCE:g}.")
    if request.decoding not in decodings(pipe):
        raise ValueError(f"The decoding must be one of {', '.join(decodings(pipe))}.")
    largest = pipe.student.config.max_guidance_scale if pipe.student is not None else math.inf
    if request.decoding == STUDENT and scale > largest:
        raise ValueError(f"The student knows guidance scales up to {largest:g}.")
    if request.noise_removal not in noise_removals(pipe):
        raise ValueError(f"This pipeline removes noise by {', '.join(noise_removals(pipe))}.")
    steps = None
    if pipe.noise_levels is not None and request.steps is not None:
        steps = whole_number(request.steps, "The number of steps", 1, MOST_STEPS)
    check_num_images(pipe, count, guided=scale > 1)
    return replace(request, guidance_scale=float(scale), seed=seed, count=count, steps=steps)


def check_prompt(prompt: Any) -> None:
    """An error for a caption that is empty or far too long."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("Write a caption first: the prompt is empty.")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"The prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are taken.")


def whole_number(value: Any, name: str, least: int, most: int) -> int:
    """A whole number within bounds; an error also for nothing, text, fractions and not-a-number."""
    number = isinstance(value, int | float) and math.isfinite(value) and value == int(value)
    if not number or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}.")
    return int(value)


def draw(pipe: FlowPipeline, request: Request, lock: threading.Lock, stopped: threading.Event) -> Iterator[Progress]:
    """Draw in a thread; it stops before its next block when asked to, or when this generator is closed.

    Args:
        pipe: a `FlowPipeline`.
        request: a `checked` one.
        lock: held while the pipeline is in use.
        stopped: set by whoever wants the run to stop; set at the end in any case.

    Yields:
        how far it is, at each stage and each `BEAT`; the last one has the result.

    Raises:
        StoppedError: if it was stopped, at most a `BEAT` later.
        Exception: what the pipeline raised.
    """
    events: queue.Queue[Progress | Exception] = queue.Queue()
    threading.Thread(target=work, args=(pipe, request, lock, events, stopped), daemon=True).start()
    began, progress = time.perf_counter(), Progress()
    try:
        while progress.result is None:
            try:
                event = events.get(timeout=BEAT)
            except queue.Empty:
                event = progress
            if stopped.is_set():
                raise StoppedError
            if isinstance(event, Exception):
                raise event
            progress = event
            yield replace(progress, seconds=time.perf_counter() - began)
    finally:
        stopped.set()


def work(
    pipe: FlowPipeline, request: Request, lock: threading.Lock, events: queue.Queue[Any], stopped: threading.Event
) -> None:
    """What the thread does: one run, its stages and its end into ``events``."""
    with lock:
        if stopped.is_set():
            return
        try:
            run(pipe, request, events, stopped)
        except StoppedError:
            pass
        except Exception as error:  # noqa: BLE001 (whatever it is, the page must say it)
            events.put(error)


def run(pipe: FlowPipeline, request: Request, events: queue.Queue[Any], stopped: threading.Event) -> None:
    """Draw, and put a `Progress` for each stage."""
    blocks = 1 if request.decoding == STUDENT else len(pipe.flow.blocks)
    walk = arguments(pipe, request).get("num_inference_steps", 1)
    levels = walk if walk > 1 else 0  # one step is the last stage
    stages: list[Stage] = []
    shown_for = 0.0

    def show(name: str, latents: Tensor, message: str, counted: bool = True) -> None:
        nonlocal shown_for
        if stopped.is_set():
            raise StoppedError
        began = clock(pipe.flow.device)
        images = pipe.image_processor.postprocess(pipe.decode_latents(latents), output_type="pil")
        stages.append(Stage(name, images))
        events.put(Progress(list(stages), (len(stages) - 1) / (blocks + max(1, levels)) if counted else None, message))
        shown_for += clock(pipe.flow.device) - began

    def after_block(_: Any, index: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        done = index + 1
        if done > blocks:
            if done < blocks + levels:  # the last one is shown as what is drawn
                show(f"level {done - blocks} of {levels}", tensors["latents"], f"level {done - blocks + 1} of {levels}")
            return {}
        name = f"block {done}" if done < blocks else f"block {done}, raw"
        name = STUDENT if request.decoding == STUDENT else name
        show(name, tensors["latents"], f"block {done + 1} of {blocks}" if done < blocks else "removing the noise")
        return {}

    def generators() -> list[torch.Generator]:
        return image_generators(request.seed, range(request.count))

    trial = tries_decodings(pipe, request)
    with torch.no_grad():
        shape = pipe.latent_shape(None, None)
        noise = pipe.prepare_latents(request.count, shape, pipe.flow.device, generators(), None)
        noise = pipe.config.temperature * noise
        show("noise", noise, "trying decodings, once for such a call" if trial else f"block 1 of {blocks}", not trial)
    shown_for, began = 0.0, clock(pipe.flow.device)
    output = pipe(
        **arguments(pipe, request),
        generator=generators(),
        return_residual=True,
        callback_on_step_end=after_block,
    )
    seconds = clock(pipe.flow.device) - began - shown_for
    if request.noise_removal != "none" and not cleaned(pipe, request):
        stages.append(Stage("noise removed", output.images))
    residuals = (output.residual_max.tolist(), output.residual_mean.tolist())
    result = Result(output.images, *residuals, seconds, trial, taken_decodings(pipe, request))
    events.put(Progress(list(stages), 1.0, "done", result=result))


def tries_decodings(pipe: FlowPipeline, request: Request) -> bool:
    """Whether a run begins with a calibration, as nothing is known yet of calls like it."""
    if request.decoding not in ("auto", "fast") or is_elsewhere(pipe.flow) or pipe.flow.blocks[0].one_pass:
        return False
    tolerance = FAST_TOLERANCE if request.decoding == "fast" else DEFAULT_TOLERANCE
    side = pipe.flow.config.sample_size // pipe.flow.config.patch_size
    guidance = Guidance(request.guidance_scale - 1, pipe.config.guidance_method)
    fast = pipe.usable_fast_steps() is not None
    key = conditions_key(pipe.flow, request.count, (side, side), guidance, tolerance, fast)
    known = pipe.calibration_store().calibrations.get(key)
    return known is None or known.stale


def cleaned(pipe: FlowPipeline, request: Request) -> bool:
    """Whether a student has removed the training noise itself."""
    return request.decoding == STUDENT and pipe.student is not None and pipe.student.config.target == "clean"


def arguments(pipe: FlowPipeline, request: Request) -> dict[str, Any]:
    """Of the pipeline's call."""
    kind = pipe.flow.config.conditioning
    condition: dict[str, Any] = {"num_images": request.count}
    if kind != "none":
        condition = {"num_images_per_prompt": request.count}
        condition |= {"prompt": request.prompt} if kind == "prefix" else {"class_labels": request.label}
    removal = (None, None) if cleaned(pipe, request) else NOISE_REMOVALS[request.noise_removal]
    walked = pipe.noise_levels is not None and removal[0] is True
    steps = pipe.config.num_inference_steps if request.steps is None else request.steps
    return {
        **condition,
        **({"num_inference_steps": steps} if walked else {}),
        **dict(zip(("denoise", "decoder"), removal, strict=True)),
        "guidance_scale": None if kind == "none" else request.guidance_scale,
        "decoding": request.decoding,
    }


def taken_decodings(pipe: FlowPipeline, request: Request) -> list[str]:
    """How the run that has just ended inverted each block, the first inverted one first."""
    if request.decoding == STUDENT:
        return [STUDENT] * len(pipe.flow.blocks)
    return [
        one.method if one.segment is None else f"{one.method}, {one.segment} tokens"
        for one in reversed(pipe.decodings or [])
    ]
