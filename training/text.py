"""Text encoders for captions: a pretrained frozen one, or a small one trained with the flow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tarflow.pipeline.text import load_text_encoder
from tarflow.training.config import TextConfig

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_text(config: TextConfig, captions: Iterable[str]) -> tuple[Any, Any]:
    """Text encoder and tokenizer; (None, None) for kind "none".

    Args:
        config: the text section.
        captions: training captions, for a small encoder's tokenizer.

    Raises:
        ValueError: if a pretrained encoder cannot be loaded.
    """
    if config.kind == "none":
        return None, None
    if config.kind == "pretrained":
        return load_text_encoder(config.name, config.subfolder)
    tokenizer = train_tokenizer(captions, config)
    return T5EncoderModel(small_t5(config, len(tokenizer))), tokenizer


def small_t5(config: TextConfig, vocab_size: int) -> T5Config:
    """Sizes of the small encoder. Without dropout, so that training is the same after a resume."""
    return T5Config(
        vocab_size=vocab_size,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.width * 4,
        num_layers=config.layers,
        num_heads=config.heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )


def train_tokenizer(captions: Iterable[str], config: TextConfig) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer of words or byte pairs that ends every caption with an end token."""
    special = list(SPECIAL.values())
    if config.unit == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
        trainer = trainers.WordLevelTrainer(vocab_size=config.vocab_size, special_tokens=special)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=special, show_progress=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(captions, trainer)
    eos = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config.max_length, clean_up_tokenization_spaces=False, **SPECIAL
    )


def token_ids(tokenizer: Any, captions: list[str], max_length: int, device: torch.device) -> tuple[Any, Any]:
    """Padded token ids and attention mask, (B, max_length) each."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)
