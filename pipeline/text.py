"""Captions to condition tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor


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
