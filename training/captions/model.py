"""The model: a frozen vision model of Transformers beside a small BERT, joined as VisionTextDualEncoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTImageProcessor,
)

from tarflow.evaluation.features.backbones import first_line, local_or_hub
from tarflow.training.captions.config import CaptionModelConfig
from tarflow.training.loop.tokenizer import make_tokenizer

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>"}


def load_vision(path: str, image_size: int | None) -> tuple[PreTrainedModel, Any]:
    """A vision model with pooled features (B, D), and its image processor.

    Args:
        path: folder or hub id.
        image_size: side that pictures are brought to; None is the model's own.

    Raises:
        ValueError: if it cannot be loaded, lacks weights, or has no such features.
    """
    path = local_or_hub(path)
    try:
        vision, loading = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load a vision model of Transformers from {path!r}: {first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"the model in {path!r} lacks weights, which would be random: {missing[0]}")
    if vision.main_input_name != "pixel_values":
        raise ValueError(f"the model in {path!r} is no vision model: it takes {vision.main_input_name}")
    if image_size is not None:
        processor = ViTImageProcessor(
            size={"height": image_size, "width": image_size},
            resample=processor.resample,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
        )
    try:
        pooled = pooled_features(vision.eval(), processor, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model in {path!r} gives no features of pictures of this size: {first_line(error)}"
        ) from error
    if pooled.ndim != 2:
        raise ValueError(f"the model in {path!r} gives features {tuple(pooled.shape)}, expected (pictures, numbers)")
    vision.config.hidden_size = pooled.shape[1]  # by which it is joined; MobileNet's settings lack it
    return vision.requires_grad_(False), processor


@torch.no_grad()
def pooled_features(vision: PreTrainedModel, processor: Any, pictures: Tensor) -> Tensor:
    """Features (B, D) of uint8 pictures (B, 3, H, W)."""
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"].to(vision.device)
    found: Tensor = vision(pixel_values=pixels.contiguous(memory_format=torch.channels_last)).pooler_output
    return found


def caption_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte pairs in small letters, behind the token whose state stands for the caption."""
    return make_tokenizer(captions, "bpe", vocab_size, max_length, SPECIAL, f"{SPECIAL['cls_token']} $A")


def make_model(vision: PreTrainedModel, config: CaptionModelConfig, vocab_size: int) -> VisionTextDualEncoderModel:
    """The vision model with a new Transformer for captions and two projections."""
    text = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=config.max_length,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=0,
    )
    joined = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text, projection_dim=config.projection)
    model = VisionTextDualEncoderModel(joined, vision_model=vision)
    model.vision_model.requires_grad_(False)
    return model
