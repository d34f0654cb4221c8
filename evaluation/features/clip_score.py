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
        model: folder or hub id of a CLIP model of Transformers, with its tokenizer and image processor.
        batch_size: pictures per pass and process.
        device: where to run.

    Raises:
        ValueError: if captions are missing or the model cannot be loaded.
    """
    if len(captions) != len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} pictures of {images.name!r}")
    clip, tokenizer, processor = load_clip(model, device)
    process, processes = process_and_count()
    values: list[float] = []
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
        values += cosines(output.image_embeds, output.text_embeds).clamp(min=0).mul(100).tolist()
    parts = gather_objects(values)
    return math.fsum(value for part in parts for value in part) / len(images)  # exact, so in any order


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the angles between rows (N, D): (N,) float32."""
    return F.cosine_similarity(a.float(), b.float(), dim=1)


def load_clip(model: str, device: str | torch.device) -> tuple[Any, Any, Any]:
    """Model in float32, tokenizer and image processor.

    Raises:
        ValueError: if one of them is not there.
    """
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    path = local_or_hub(model)
    try:
        clip, loading = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        tokenizer, processor = AutoTokenizer.from_pretrained(path), CLIPImageProcessor.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load a CLIP model of Transformers from {model!r}: {first_line(error)}") from error
    if loading["missing_keys"]:
        raise ValueError(f"{model!r} is no whole CLIP model: {min(loading['missing_keys'])} would be random")
    return clip.to(device).eval(), tokenizer, processor
