"""Text encoders for captions: a pretrained frozen one, or a small one trained with the flow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tarflow.data.latents import CachedLatents
from tarflow.data.stream.stream import Stream
from tarflow.pipeline.text.encoding import check_options, cut_captions, shortened
from tarflow.pipeline.text.loading import load_text_encoder
from tarflow.pipeline.text.options import TextOptions
from tarflow.training.flow.config import TextConfig
from tarflow.training.loop.tokenizer import make_tokenizer
from tarflow.vae.codec import tensors_hash, weights_hash

if TYPE_CHECKING:
    from tarflow.training.flow.setup import Parts

#: So many captions are looked at for ones that are too long.
LOOKED_AT = 4096
#: So many of a stream, whose rows have to be fetched for it.
STREAMED = 256
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_text(config: TextConfig, captions: Iterable[str]) -> tuple[Any, Any]:
    """Text encoder and tokenizer; (None, None) for kind "none".

    Args:
        config: the text section.
        captions: training captions, for a small encoder's tokenizer.

    Raises:
        ValueError: if a pretrained encoder cannot be loaded, or cannot do what the settings ask of it.
    """
    if config.kind == "none":
        return None, None
    if config.kind == "pretrained" and config.name is not None:
        encoder, tokenizer = load_text_encoder(config.name, config.subfolder, config.tokenizer_subfolder)
        check_options(encoder, tokenizer, config.max_length, config.options)
        return encoder, tokenizer
    tokenizer = train_tokenizer(captions, config)
    return T5EncoderModel(small_t5(config, len(tokenizer))), tokenizer


def load_cached_text(config: TextConfig, found: Mapping[str, Any]) -> tuple[Any, Any]:
    """Text encoder and tokenizer that encoded a cache's captions.

    Args:
        config: the text section.
        found: what the cache tells of its encoder, with the hash of its weights.

    Raises:
        ValueError: if the encoder of that name is another one now.
    """
    encoder, tokenizer = load_text(config, ())
    if found.get("hash") not in (None, weights_hash(encoder)):
        raise ValueError(
            f"the captions were encoded with other weights than text.name {config.name!r} has now: give the encoder that "
            "they were encoded with, or cache them anew"
        )
    return encoder, tokenizer


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
    form = f"$A {SPECIAL['eos_token']}"
    return make_tokenizer(captions, config.unit, config.vocab_size, config.max_length, SPECIAL, form)


def encoder_settings(config: TextConfig) -> dict[str, Any]:
    """What decides how captions are encoded, by name; what has its default is left out unless it always stood there."""
    settings = {"name": config.name, "subfolder": config.subfolder, "max_length": config.max_length}
    if config.tokenizer_subfolder is not None:
        settings["tokenizer_subfolder"] = config.tokenizer_subfolder
    return settings | config.options.changed


def settings_difference(found: Mapping[str, Any], config: TextConfig) -> str | None:
    """In words, the first setting in which captions were encoded otherwise; None if there is none.

    Args:
        found: `encoder_settings` with which they were, and more.
        config: the text section.
    """
    here = {field.name: getattr(config, field.name) for field in fields(TextConfig)}
    defaults = {field.name: field.default for field in fields(TextConfig)}
    for name in ("name", "subfolder", "tokenizer_subfolder", "max_length", *asdict(TextOptions())):
        there = found.get(name, defaults[name])
        if there != here[name]:
            return f"text.{name} {there!r}, but it is {here[name]!r} here"
    return None


def text_invariants(config: TextConfig, encoder: nn.Module | None) -> dict[str, Any] | None:
    """What decides how captions are encoded, as checkpoints keep it; None without captions.

    Args:
        config: the text section.
        encoder: the run's; None if captions were encoded when they were cached.
    """
    if config.kind == "none":
        return None
    invariants = {"kind": config.kind, "max_length": config.max_length, **asdict(config.options)}
    if config.kind == "small":
        invariants |= {"width": config.width, "layers": config.layers, "heads": config.heads}
    if config.kind == "pretrained" and encoder is not None:
        # The first numbers of each weight tell encoders apart in no time, however large they are.
        first = [(name, weight.detach().flatten()[:256]) for name, weight in encoder.named_parameters()]
        invariants["encoder"] = tensors_hash(first)
    return invariants


def check_text(path: Path, there: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    """Whether a run encodes captions as its checkpoint was trained with; checkpoints from before this was kept pass.

    Args:
        path: of the checkpoint.
        there, here: `text_invariants` of the checkpoint and of the run.

    Raises:
        ValueError: that names the first difference.
    """
    for name, value in (there or {}).items():
        if name == "encoder" and (here or {}).get(name) not in (None, value):
            raise ValueError(f"the checkpoint {str(path)!r} was trained with another text encoder than text.name gives")
        if name != "encoder" and (found := (here or {"kind": "none"}).get(name)) != value:
            raise ValueError(
                f"the checkpoint {str(path)!r} was trained with text.{name} {value!r}, but it is {found!r} here: set it so"
            )


def caption_reports(parts: Parts, config: TextConfig, fresh: bool) -> list[str | None]:
    """Sentences on a run's training captions that are too long and, as it begins, on words that a small tokenizer does not
    know; None where there are none.

    Args:
        parts: `Parts` of the run. Of captions that were encoded when they were cached the cache knows.
        config: the text section.
        fresh: the run begins.
    """
    if parts.null_cond is not None and isinstance(parts.train, CachedLatents):
        found = parts.train.manifest["text"].get("cut")
        return [found and cut_sentence(found["count"], found["of"], config.max_length, found["example"])]
    if parts.tokenizer is None:
        return []
    texts = looked_at(parts.train)
    cut = cut_report(parts.tokenizer, texts, len(parts.train), config)
    return [cut, unknown_report(parts.tokenizer, texts) if fresh and config.kind == "small" else None]


def unknown_report(tokenizer: Any, texts: list[str]) -> str | None:
    """A sentence on captions with words that a small tokenizer does not know; None if there are none.

    Args:
        texts: see `looked_at`.
    """
    unknown = tokenizer.unk_token_id
    lacking = [text for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True) if unknown in ids]
    if not lacking:
        return None
    return (
        f"{len(lacking)} of {len(texts)} captions have words that are not among the {len(tokenizer):,} of the tokenizer, for "
        f"example {shortened(lacking[0])!r}: raise text.vocab_captions or text.vocab_size, or set text.unit bpe"
    )


def looked_at(captions: Any) -> list[str]:
    """Some captions of what has ``len`` and a ``caption`` by index; of more than `LOOKED_AT` as many at equal distances."""
    streamed = isinstance(captions, Stream)
    step = -(-len(captions) // LOOKED_AT)
    indices = range(STREAMED) if streamed else range(0, len(captions), step or 1)
    return [captions.caption(index) for index in indices]


def cut_report(tokenizer: Any, texts: list[str], total: int, config: TextConfig) -> str | None:
    """A sentence on captions that are longer than ``text.max_length`` tokens; None if all fit.

    Args:
        texts: see `looked_at`.
        total: how many captions there are.
    """
    cut = cut_captions(tokenizer, texts, config.max_length, config.options)
    share = f"{len(texts)} captions" + (" that were looked at" if len(texts) < total else "")
    return cut_sentence(len(cut), share, config.max_length, cut[0]) if cut else None


def cut_sentence(count: int, total: str, max_length: int, example: Sequence[str]) -> str:
    """What is said of captions that are cut.

    Args:
        count: how many.
        total: of how many, in words.
        example: a caption and the part that is cut off.
    """
    caption, removed = map(shortened, example)
    are = "is" if count == 1 else "are"
    return (
        f"{count} of the {total} {are} longer than {max_length} tokens (text.max_length) and {are} cut, for "
        f"example: {caption!r} loses {removed!r}"
    )
