"""Captions to condition tokens, by any text encoder of Transformers.

B captions, L tokens of each, padded on the right whatever the tokenizer's own habit is, E numbers per token.
"""

from __future__ import annotations

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tarflow.pipeline.text.options import TextOptions

logger = logging.get_logger(__name__)
#: So many parts that are cut off are shown at once, and so many letters of each.
SHOWN, SHOWN_LETTERS = 4, 300
#: Text models that were trained to see padding, and that their tokenizers give no mask for.
SEES_PADDING = ("siglip_text_model", "siglip2_text_model")


def embedding_width(encoder: PreTrainedModel) -> int:
    """Size of the encoder's hidden states."""
    config = encoder.config
    return int(config.d_model if hasattr(config, "d_model") else config.hidden_size)


@torch.no_grad()
def encode_captions(
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    max_length: int,
    options: TextOptions | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Hidden states (B, max_length, E) of captions; padding positions are 0.

    Args:
        text_encoder: an encoder or decoder-only language model of Transformers, in evaluation mode.
        tokenizer: its tokenizer; captions are padded or cut to ``max_length`` tokens.
        captions: B texts; the empty one is the null condition.
        options: see `TextOptions`; None are the defaults.
        device: where the encoder computes, if its weights are elsewhere until they are used.

    Raises:
        ValueError: if ``max_length``, options or tokenizer do not fit the encoder.
    """
    options = options or TextOptions()
    check_options(text_encoder, tokenizer, max_length, options)
    ids, mask = token_ids(tokenizer, captions, max_length, options)
    rows = text_encoder.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise ValueError(
            f"the tokenizer gives token {int(ids.max())}, but the text encoder has embeddings for {rows}: they do not "
            "belong together"
        )
    own = next(text_encoder.parameters()).device
    device = own if own.type != "meta" or device is None else device
    return hidden_states(text_encoder, ids.to(device), mask.to(device), options.hidden_layer)


def hidden_states(text_encoder: PreTrainedModel, ids: Tensor, mask: Tensor, hidden_layer: int = -1) -> Tensor:
    """One of the encoder's hidden states (B, L, E), 0 where ``mask`` is.

    Args:
        ids, mask: token ids and attention mask (B, L).
        hidden_layer: see `TextOptions`.
    """
    inputs = {"input_ids": ids}
    if text_encoder.config.model_type not in SEES_PADDING:
        inputs["attention_mask"] = mask
    if hidden_layer == -1:
        hidden = text_encoder(**inputs).last_hidden_state
    else:
        hidden = text_encoder(**inputs, output_hidden_states=True).hidden_states[hidden_layer]
    # Not a product: a caption without a token sees nothing at all, which some kinds of attention answer by NaN.
    return torch.where(mask[..., None].bool(), hidden, torch.zeros_like(hidden))


def token_ids(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int, options: TextOptions | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of captions, (B, max_length) each, padded on the right, on the CPU.

    Tokenizers without a padding token take 0 there, which the mask hides.
    """
    rows = tokenized(tokenizer, captions, options or TextOptions(), max_length)
    ids = torch.full((len(rows), max_length), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, (found, place) in enumerate(zip(rows, ids, strict=True)):
        place[: len(found)] = torch.tensor(found, dtype=ids.dtype)
        mask[row, : len(found)] = 1
    return ids, mask


def tokenized(
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    options: TextOptions,
    max_length: int | None = None,
    special: bool = True,
) -> list[list[int]]:
    """Tokens of each caption, with the texts that the options put around it, cut to ``max_length``. ``special`` adds
    the tokenizer's first and last tokens, which a chat template already has.

    Raises:
        ValueError: for a caption that is no valid text.
    """
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the caption {caption!r} has bytes that are no text in UTF-8: write it anew") from error
    texts = options.filled(tokenizer, captions)
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    found = tokenizer(texts, add_special_tokens=special and not options.chat_template, verbose=False, **cut)
    return found.input_ids


def cut_captions(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int, options: TextOptions | None = None
) -> list[tuple[str, str]]:
    """Captions that have more tokens than ``max_length``, each with the part of its text that is cut off."""
    options = options or TextOptions()
    added = 0 if options.chat_template else tokenizer.num_special_tokens_to_add()
    kept = max(0, max_length - added)
    cut = []
    for caption, ids in zip(captions, tokenized(tokenizer, captions, options, special=False), strict=True):
        if len(ids) > kept:
            left = tokenizer.truncation_side == "left"
            removed = tokenizer.decode(ids[: len(ids) - kept] if left else ids[kept:])
            cut.append((caption, removed))
    return cut


def shortened(text: str) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} …"


def warn_of_cuts(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int, options: TextOptions
) -> None:
    """Warn of captions that are too long, as pipelines of Diffusers do; of many, some are shown."""
    if cut := cut_captions(tokenizer, captions, max_length, options):
        logger.warning(
            f"{len(cut)} of {len(captions)} captions are longer than {max_length} tokens, which is what is read of them; "
            f"cut off: {[shortened(removed) for _, removed in cut[:SHOWN]]}{' and so on' if len(cut) > SHOWN else ''}"
        )


def check_options(
    text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, options: TextOptions
) -> None:
    """Whether an encoder can do what is asked of it.

    Raises:
        ValueError: that says what it can do.
    """
    positions = position_count(text_encoder)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"captions are to have {max_length} tokens, but the text encoder, a {type(text_encoder).__name__}, has "
            f"positions for {positions}: set max_length to at most that"
        )
    added = 0 if options.chat_template else tokenizer.num_special_tokens_to_add()
    if max_length <= added:
        raise ValueError(
            f"captions are to have {max_length} tokens, of which the tokenizer needs {added} for their ends: set "
            f"max_length to at least {added + 1}"
        )
    layers = getattr(text_encoder.config, "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= options.hidden_layer <= layers:
        raise ValueError(
            f"hidden_layer is {options.hidden_layer}, but the text encoder has {layers} layers: 0 (its embeddings) to "
            f"{layers}, or -1 (the last) to {-layers - 1}"
        )
    if options.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat_template is true, but the tokenizer has no chat template: leave it out, or use prefix")


def position_count(text_encoder: PreTrainedModel) -> int | None:
    """How many tokens the encoder has positions for; None if that is not bounded."""
    for name, module in text_encoder.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("position_embedding", "position_embeddings", "wpe"):
            # RoBERTa's positions begin behind that of padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    count = getattr(text_encoder.config, "max_position_embeddings", None)
    return count if count is not None and count > 0 else None  # XLNet, without a bound, has −1
