"""Tokenizers that are made of a run's own captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(
    captions: Iterable[str],
    unit: Literal["word", "bpe"],
    vocab_size: int,
    max_length: int,
    special: Mapping[str, str],
    form: str,
) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer of words or byte pairs.

    Args:
        special: the special tokens by what Transformers calls them, in the order of their numbers; with "unk_token".
        form: of an encoded caption: "$A" is its own tokens, beside which a special token stands.
    """
    unknown, tokens = special["unk_token"], list(special.values())
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": tokens, "show_progress": False}
    word = unit == "word"
    tokenizer = Tokenizer(models.WordLevel(unk_token=unknown) if word else models.BPE(unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        captions, trainers.WordLevelTrainer(**options) if word else trainers.BpeTrainer(**options)
    )
    added = [(token, tokenizer.token_to_id(token)) for token in tokens if token in form.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **special
    )
