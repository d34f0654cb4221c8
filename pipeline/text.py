"""Captions to condition tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel


def load_text_encoder(name: str, subfolder: str | None = None) -> tuple[Any, Any]:
    """A frozen pretrained T5 encoder and its tokenizer, from a folder or hub id.

    Raises:
        ValueError: if there is none.
    """
    try:
        options = {"subfolder": subfolder} if subfolder else {}
        tokenizer = AutoTokenizer.from_pretrained(name)
        encoder = T5EncoderModel.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the text encoder {name!r}: {reason}") from error
    return encoder.eval().requires_grad_(False), tokenizer


def embedding_width(encoder: Any) -> int:
    """Size of the encoder's hidden states."""
    return int(encoder.config.d_model if hasattr(encoder.config, "d_model") else encoder.config.hidden_size)


def encode_captions(text_encoder: Any, tokenizer: Any, captions: list[str], max_length: int) -> Tensor:
    """Last hidden states (B, max_length, E) of captions; padding positions are multiplied by 0.

    Args:
        text_encoder: a Transformers encoder.
        tokenizer: its tokenizer; captions are padded or cut to ``max_length`` tokens.
        captions: B texts; the empty one is the null condition.
    """
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    device = next(text_encoder.parameters()).device
    mask = tokens.attention_mask.to(device)
    hidden = text_encoder(input_ids=tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)
