"""Whether a call's arguments fit the model and each other: one sentence for each way in which they do not."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tarflow.pipeline.call.checks import check_guidance_scale, check_kind, check_texts
from tarflow.pipeline.call.choices import DECODERS, DENOISE
from tarflow.pipeline.call.labels import label_of, unknown_class

Labels = int | str | list[int | str]


def check_inputs(
    config: Any,
    prompt: str | list[str] | None,
    class_labels: Labels | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: Tensor | None,
    guidance_scale: float,
) -> None:
    """Whether the conditions of a call fit a flow of this configuration."""
    kind = config.conditioning
    if prompt is not None and class_labels is not None:
        raise ValueError("give either prompt or class_labels, not both")
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("give either prompt or prompt_embeds, not both")
    if kind == "prefix" and prompt is None and prompt_embeds is None:
        raise ValueError("this model draws from captions: give prompt (or prompt_embeds)")
    captions = {"prompt": prompt, "negative_prompt": negative_prompt, "prompt_embeds": prompt_embeds}
    check_kind(kind, captions, {"class_labels": class_labels})
    if kind.startswith("class") and class_labels is None:
        raise ValueError(f"this model draws classes: give class_labels, 0 to {config.num_classes - 1}")
    check_texts("prompt", prompt)
    check_texts("negative_prompt", negative_prompt)
    check_guidance_scale(guidance_scale)


def check_callback(wanted: Sequence[str] | None, allowed: Sequence[str]) -> None:
    """Whether there are the tensors that a callback wants."""
    for name in wanted or []:
        if name not in allowed:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name {', '.join(allowed)}, got {name!r}")


def check_output_type(config: Any, output_type: str, pixels: bool) -> None:
    """Whether a flow's samples can be given in this form; ``pixels`` if the pipeline has no autoencoder."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
    if pixels and output_type != "latent" and config.in_channels not in (1, 3):
        raise ValueError(
            f"this pipeline has no autoencoder to decode {config.in_channels} channels: load it with "
            "from_pretrained(…, vae=…), or ask for output_type='latent'"
        )


def resolve_denoising(
    config: Any,
    denoise: bool | str | None,
    decoder: str | None,
    default: tuple[str, bool],
    pixels: bool,
    finetuned: bool,
) -> tuple[bool | str, str]:
    """How the training noise is removed: by a step before decoding, or by a decoder that learned it.

    Args:
        config: of the flow.
        denoise, decoder: of the call; see `TARFlowPipeline`.
        default: the pipeline's own decoder, and whether it takes the score step before the autoencoder's.
        pixels: the pipeline has no autoencoder.
        finetuned: it has a finetuned decoder.

    Returns:
        True (the score step), False or "learned"; and "vae" or "finetuned".
    """
    if denoise not in (None, True, False, *DENOISE):
        raise ValueError(f"denoise must be None, True, False, 'none', 'score' or 'learned', got {denoise!r}")
    denoise = False if denoise == "none" else denoise
    if decoder not in (None, *DECODERS):
        raise ValueError(f"decoder must be None, 'vae' or 'finetuned', got {decoder!r}")
    if denoise and decoder == "finetuned":
        raise ValueError(
            f"decoder='finetuned' takes noisy latents and removes their noise itself: leave denoise={denoise!r} out, "
            "or take decoder='vae'"
        )
    if denoise == "learned" and config.get("learned_denoiser", "none") == "none":
        raise ValueError("this model has no learned denoiser; denoise=True is the score step")
    if decoder is None:
        decoder = "vae" if denoise else default[0]
    check_decoder(decoder, pixels, finetuned)
    if denoise is None:
        return decoder == "vae" and default[1], decoder
    return (True if denoise == "score" else denoise), decoder


def check_decoder(decoder: str, pixels: bool, finetuned: bool) -> None:
    """Whether a pipeline has this decoder; ``pixels`` and ``finetuned`` as of `resolve_denoising`."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be 'vae' or 'finetuned', got {decoder!r}")
    if decoder == "finetuned" and pixels:
        raise ValueError("this model draws pixels: there is no decoder, finetuned or not; leave decoder out")
    if decoder == "finetuned" and not finetuned:
        raise ValueError(
            "this pipeline has no finetuned decoder: make one with tarflow finetune-decoder, or take decoder='vae'"
        )


def latent_shape(config: Any, factor: int, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Channels, height and width of the latents for an image size.

    Args:
        config: of the flow.
        factor: pixels per latent position along each side.
        height, width: of the image; None is the training size.

    Raises:
        ValueError: if the size does not fit the factor and patches, learned positions or a learned prior.
    """
    sides = []
    for name, side in (("height", height), ("width", width)):
        side = config.sample_size * factor if side is None else side
        unit = factor * config.patch_size
        if side < unit or side % unit:
            raise ValueError(f"{name} must be a positive multiple of {unit}, got {side}")
        if (config.positions == "learned" or config.get("deep_order")) and side != config.sample_size * factor:
            raise ValueError(f"{name} must be {config.sample_size * factor} with learned positions, got {side}")
        if config.get("learned_prior") and side != config.sample_size * factor:
            raise ValueError(
                f"{name} must be {config.sample_size * factor}, got {side}: the model has learned its prior for each "
                "place of that size"
            )
        sides.append(side // factor)
    return config.in_channels, sides[0], sides[1]


def label_indices(class_labels: Labels, names: dict[str, int], count: int) -> list[int]:
    """Class labels, given by index or name, as indices.

    Args:
        class_labels: one or several.
        names: indices by name, see `labels_by_name`.
        count: of the classes.
    """
    labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
    if not labels:
        raise ValueError("class_labels is empty; give at least one")
    indices = []
    for label in labels:
        if isinstance(label, str):
            found = label_of(label, names)
            if found is None:
                raise ValueError(unknown_class(label, names))
            label = found
        try:
            index = operator.index(label)
        except TypeError as error:
            message = f"class_labels must be numbers or names of classes, one or a list of them, got {class_labels!r}"
            raise ValueError(message) from error
        if not 0 <= index < count:
            raise ValueError(f"class labels must be 0 to {count - 1}, got {label}")
        indices.append(index)
    return indices
