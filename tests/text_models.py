"""Tiny random text encoders of several families, with tokenizers of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORDS = (
    "small",
    "large",
    "red",
    "blue",
    "circle",
    "square",
    "on",
    "a",
    "dark",
    "light",
    "background",
    "user",
    "answer",
)
VOCABULARY = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", ":", *WORDS))}
CHAT = "{% for m in messages %}user : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
#: Positions of the families that have a table of them.
POSITIONS = 20
WIDTH, LAYERS = 16, 3
SIZES = {"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": POSITIONS}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
#: Arguments of each family's configuration.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5EncoderModel": (
        "T5Config",
        {"vocab_size": 32, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": 2},
    ),
    "UMT5EncoderModel": (
        "UMT5Config",
        {"vocab_size": 32, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": 2},
    ),
    "CLIPTextModel": ("CLIPTextConfig", {**SIZES, **HEADS, **SPECIAL}),
    "SiglipTextModel": ("SiglipTextConfig", {**SIZES, **HEADS, **SPECIAL}),
    "BertModel": ("BertConfig", {**SIZES, **HEADS}),
    "RobertaModel": ("RobertaConfig", {**SIZES, **HEADS, **SPECIAL, "pad_token_id": 1}),
    "Qwen3Model": ("Qwen3Config", {**SIZES, **GROUPED}),
    "Gemma2Model": ("Gemma2Config", {**SIZES, **GROUPED, **SPECIAL}),
}


def make_tokenizer(
    chat: bool = False, ends: bool = True, padding_side: str = "right", pad: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer of words and colons.

    Args:
        chat: it has a chat template.
        ends: captions begin with <s> and end with </s>, or else are their words alone.
        padding_side: its own habit.
        pad: it has a token for padding.
    """
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        padding_side=padding_side,
        chat_template=CHAT if chat else None,
        clean_up_tokenization_spaces=False,
        **({"pad_token": "<pad>"} if pad else {}),
    )


def make_encoder(family: str, **changes: Any) -> PreTrainedModel:
    """A random encoder, whose weights are large enough for captions to differ."""
    name, arguments = CONFIGS[family]
    encoder = getattr(transformers, family)(getattr(transformers, name)(**{**arguments, **changes}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def saved(folder: Path, encoder: PreTrainedModel, tokenizer: Any) -> str:
    """Both in one folder, as on the Hub."""
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
