"""Pretrained text encoders and their tokenizers, from folders and hub ids."""

from __future__ import annotations

import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file

#: A folder with one of these has a tokenizer. Transformers makes up one of its own for some models without.
TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
#: Where models that see more than text have their text part.
TEXT_PARTS = ("language_model", "text_model")


def load_text_encoder(
    name: str, subfolder: str | None = None, tokenizer_subfolder: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen pretrained text encoder, in the precision of its files, and its tokenizer.

    Any encoder or decoder-only language model of Transformers: T5, CLIP's and SigLIP's text models, BERT, Gemma, Qwen
    and so on; of encoder-decoders the encoder, of language models all but the head, of models that see pictures too the
    text part.

    Args:
        name: a folder or hub id.
        subfolder: where in it the encoder is, for example "text_encoder" of a folder of Diffusers.
        tokenizer_subfolder: where its tokenizer is. None looks in ``subfolder``, in "tokenizer" beside a
            "text_encoder" ("tokenizer_2" beside "text_encoder_2"), and in ``name`` itself.

    Raises:
        ValueError: if there is none, or one of another kind.
    """
    place = repr(name) if subfolder is None else f"{name!r} (subfolder {subfolder!r})"
    try:
        if subfolder is None and is_there(name, "", "model_index.json") and not is_there(name, "", "config.json"):
            raise ValueError("it is a folder of a pipeline: name its text encoder with subfolder, such as text_encoder")
        config = AutoConfig.from_pretrained(name, subfolder=subfolder or "", trust_remote_code=False)
        tokenizer = load_tokenizer(name, subfolder, tokenizer_subfolder, config)
        encoder = load_encoder(name, subfolder, encoder_class(config))
    except Exception as error:  # files that are damaged, and hubs that do not answer, raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the text encoder {place}: {reason}") from error
    return encoder.eval().requires_grad_(False), tokenizer


def load_tokenizer(
    name: str, subfolder: str | None, tokenizer_subfolder: str | None, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer of the encoder with the configuration ``config``, see `load_text_encoder`."""
    places = [tokenizer_subfolder]
    if tokenizer_subfolder is None:
        parent, _, last = (subfolder or "").rpartition("/")
        beside = last.replace("text_encoder", "tokenizer") if last.startswith("text_encoder") else None
        places = [subfolder, *([f"{parent}/{beside}".lstrip("/")] if beside else []), None]
    for place in dict.fromkeys(place or "" for place in places):
        if any(is_there(name, place, file) for file in TOKENIZER_FILES):
            # Without the configuration Transformers looks for one beside the tokenizer, on the Hub in vain.
            return AutoTokenizer.from_pretrained(name, subfolder=place, config=config, trust_remote_code=False)
    looked = " or ".join(repr(place) if place else "its root" for place in dict.fromkeys(places))
    raise ValueError(f"there is no tokenizer in {looked}: name the folder with tokenizer_subfolder")


def is_there(name: str, subfolder: str, file: str) -> bool:
    """Whether a folder or a hub id has a file in a subfolder."""
    return cached_file(name, file, subfolder=subfolder, _raise_exceptions_for_missing_entries=False) is not None


def load_encoder(name: str, subfolder: str | None, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The encoder, from the files of a model that has the class ``kind`` without its head; see `load_text_encoder`."""
    model, found = kind.from_pretrained(name, output_loading_info=True, subfolder=subfolder or "")
    part, prefix = text_part(model)
    # Poolers, which some checkpoints lack, are not used; zeros make them the same at every time of loading.
    lacking = [key for key in found["missing_keys"] if key.startswith(prefix) and "pool" not in key]
    if lacking:
        raise ValueError(f"its files lack weights of a {kind.__name__}, for example {min(lacking)}")
    weights = model.state_dict()
    for key in found["missing_keys"]:
        weights[key].zero_()
    if not isinstance(part.get_input_embeddings(), nn.Embedding) or part.can_generate():
        raise ValueError(f"it is a {kind.__name__}, whose part is no text encoder or language model without its head")
    if not hasattr(transformers, type(part).__name__):
        raise ValueError(f"its text part is a {type(part).__name__}, which a pipeline could not load")
    return part


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that has the text encoder.

    Raises:
        ValueError: for encoder-decoders whose encoder has no class of its own, and configurations without a model.
    """
    # Some text parts, such as SigLIP's, have a class that the list of base models lacks.
    own = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}Model", None)
    kind = MODEL_MAPPING.get(type(config), own)
    if kind is None:
        raise ValueError(f"it is a model of type {config.model_type!r}, of which Transformers has no base model")
    kind = kind[0] if isinstance(kind, tuple) else kind
    encoder = getattr(transformers, f"{kind.__name__.removesuffix('Model')}EncoderModel", None)
    if encoder is None and config.is_encoder_decoder:
        raise ValueError(
            f"it is a {kind.__name__}, an encoder-decoder whose encoder Transformers has no class for: take a T5, an "
            "encoder such as BERT, or a decoder-only language model"
        )
    return encoder or kind


def text_part(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """A model's part for text, and what the names of its weights begin with; a model for text alone is that itself."""
    for name in TEXT_PARTS:
        part = getattr(model, name, None)
        if isinstance(part, PreTrainedModel):
            return part, f"{name}."
    return model, ""
