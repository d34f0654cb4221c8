"""CLIP score: how well pictures fit their captions (Hessel et al., 2021, arXiv:2104.08718)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.common.processes import gather_objects, process_and_count
from tarflow.evaluation.features.backbones import first_line, local_or_hub
from tarflow.evaluation.images.sets import ImageSet


@torch.no_grad()
def clip_score(
    images: ImageSet,
    captions: Sequence[str],
    model: str,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> float:
    """Mean of max(0, 100 · cos) of the embeddings of each picture and its caption; the paper has the factor 2.5.

    Captions that are longer than the model's context are cut off. The result is the same with several processes.

    Args:
        images: the pictures.
        captions: one for each, in the pictures' order.
        model: folder or hub id of a CLIP model of Transformers, or of what ``tarflow train-captions`` trained, with its
            tokenizer and image processor.
        batch_size: pictures per pass and process.
        device: where to run.

    Raises:
        ValueError: if captions are missing or the model cannot be loaded.
    """
    pictures, texts = embeddings(images, captions, model, batch_size, device)
    values = cosines(pictures, texts).clamp(min=0).mul(100).tolist()
    return math.fsum(values) / len(images)


@torch.no_grad()
def embeddings(
    images: ImageSet,
    captions: Sequence[str],
    model: str,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """What a model of pictures and captions makes of each picture and its caption, (N, D) float32 each, on the CPU.

    Arguments and errors are those of `clip_score`.
    """
    if len(captions) != len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} pictures of {images.name!r}")
    clip, tokenizer, processor = load_clip(model, device)
    process, processes = process_and_count()
    parts: list[tuple[int, Tensor, Tensor]] = []
    for number, batch in enumerate(images.batches(batch_size, process, processes)):
        first = (process + number * processes) * batch_size
        texts = tokenizer(
            list(captions[first : first + len(batch)]),
            padding=True,
            truncation=True,
            max_length=clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        pixels = processor(list(batch), return_tensors="pt")["pixel_values"].to(device)
        output = clip(pixel_values=pixels, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])
        parts.append((first, output.image_embeds.float().cpu(), output.text_embeds.float().cpu()))
    found = sorted((part for gathered in gather_objects(parts) for part in gathered), key=lambda part: part[0])
    return torch.cat([pictures for _, pictures, _ in found]), torch.cat([texts for _, _, texts in found])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the angles between rows (N, D): (N,) float32."""
    return F.cosine_similarity(a.float(), b.float(), dim=1)


def load_clip(model: str, device: str | torch.device) -> tuple[Any, Any, Any]:
    """Model in float32, tokenizer and image processor: of CLIP, or of Transformers' VisionTextDualEncoder, which
    ``tarflow train-captions`` trains.

    Raises:
        ValueError: if one of them is not there.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPModel,
        VisionTextDualEncoderModel,
    )

    path = local_or_hub(model)
    try:
        dual = AutoConfig.from_pretrained(path).model_type == VisionTextDualEncoderModel.config_class.model_type
        kind, reader = (VisionTextDualEncoderModel, AutoImageProcessor) if dual else (CLIPModel, CLIPImageProcessor)
        clip, loading = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        tokenizer, processor = AutoTokenizer.from_pretrained(path), reader.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load a CLIP model of Transformers from {model!r}: {first_line(error)}") from error
    if loading["missing_keys"]:
        raise ValueError(f"{model!r} is no whole CLIP model: {min(loading['missing_keys'])} would be random")
    return clip.to(device).eval(), tokenizer, processor
