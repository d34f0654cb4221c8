"""The parts of a run, made from its configuration."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL

from tarflow.data.config import DataConfig
from tarflow.data.images import Images, to_model
from tarflow.data.latents import CachedLatents, open_latents
from tarflow.data.place import paths_of
from tarflow.data.shards import read_manifest
from tarflow.data.stream.first import FirstPictures
from tarflow.data.stream.stream import Stream
from tarflow.data.subset import spread_places
from tarflow.flows.trajectory.kinds import KINDS, FlowModel, kind_of
from tarflow.pipeline.call.aspect import bucket_size, ratio_of
from tarflow.pipeline.text.encoding import embedding_width
from tarflow.training.autoencoder.model import new_autoencoder
from tarflow.training.flow.config import RunConfig, VaeConfig, is_joint, noise_std
from tarflow.training.flow.start import Start, model_for_size
from tarflow.training.flow.text import load_cached_text, load_text, settings_difference
from tarflow.training.loop.batches import Items, fixed_batches, read_batches
from tarflow.vae.codec import LatentCodec, autoencoder_hash, load_autoencoder, measure_latents

#: What is trained on, or held out.
Data = Images | CachedLatents | Stream | FirstPictures
#: Larger vocabularies are kept as a hash.
LISTED_TOKENS = 10_000


@dataclass
class Parts:
    """Data, autoencoder, text encoder and flow of a run.

    Attributes:
        train, validation: pictures, cached latents or a stream; no validation if nothing is held out.
        codec: without its autoencoder if latents are cached.
        load_vae: gives the autoencoder (None for pixels), which a saved pipeline needs.
        load_text: gives text encoder and tokenizer, which a saved pipeline needs.
        text_encoder: None if there is none, or captions were encoded when they were cached.
        null_cond: the encoded empty caption (L, E) of cached encoded captions.
        flow_arguments: the complete arguments of ``flow``.
    """

    train: Data
    validation: Data | None
    codec: LatentCodec
    load_vae: Callable[[], Any]
    load_text: Callable[[], tuple[Any, Any]]
    text_encoder: Any
    tokenizer: Any
    null_cond: torch.Tensor | None
    flow: FlowModel
    flow_arguments: dict[str, Any]


def make_parts(
    config: RunConfig,
    state: dict[str, Any] | None,
    device: torch.device,
    start: Start | None = None,
) -> Parts:
    """Open the data, load the encoders, measure the latents and make the flow.

    Args:
        config: of the run.
        state: of the checkpoint to go on from, with the ``statistics`` of the latents' channels, mean and standard deviation
            or None, and the ``vocabulary``, see `SPREAD`; None measures them.
        device: of the autoencoder.
        start: the pipeline that training starts from.

    Raises:
        ValueError: if the parts do not fit together.
    """
    train = open_split(config, "train")
    conditioning = config.flow.get("conditioning", "none")
    check_conditions(config, train, conditioning)
    cache = train if isinstance(train, CachedLatents) else None
    if cache is not None:
        check_cache(config, cache)
    vae = None if cache is not None else open_autoencoder(config)
    if vae is not None:
        vae.to(device)
    if cache is None and config.data.image_size % (factor := LatentCodec(vae).factor):
        raise ValueError(
            f"data.image_size ({config.data.image_size}) must be a multiple of {factor}, the autoencoder's"
        )
    if isinstance(train, Stream):
        train = sized(train, config, LatentCodec(vae).factor)
    validation = held_out_of(train, config)
    statistics = None if state is None else state["statistics"]
    if start is not None:
        start.check_autoencoder(vae if cache is None else cache.manifest["autoencoder"]["hash"])
        if not is_joint(config) and noise_std(config) > 0:
            start.check_posterior(config.vae)
        statistics = start.statistics
    normalised = config.vae.measure_images > 0 if start is None and state is None else statistics is not None
    codec = make_codec(config.vae, train, vae, statistics, device) if normalised else LatentCodec(vae)
    channels, side = latent_shape(config, train, codec)

    torch.manual_seed(config.train.seed)
    captions: Any = ()
    if config.text.kind == "small":
        spread = state is None or state.get("vocabulary") == SPREAD
        places = vocabulary_places if spread else first_places
        captions = (train.caption(i) for i in places(train, config.text.vocab_captions))
    null_cond = cache.null_cond if cache is not None and config.text.kind == "pretrained" else None
    text_encoder = tokenizer = None
    if null_cond is None:
        text_encoder, tokenizer = load_text(config.text, captions) if start is None else start.text(config.text)
    derived: dict[str, Any] = {"in_channels": channels, "sample_size": side}
    if conditioning.startswith("class"):
        derived["num_classes"] = len(train.class_names or ())
    if config.train.noise_levels is not None:
        derived["noise_conditioning"] = True
    if conditioning == "prefix":
        derived["cond_dim"] = embedding_width(text_encoder) if null_cond is None else null_cond.shape[1]
    arguments = flow_arguments(config, derived, start)
    if (cache is not None and len(cache.shapes) > 1) or (isinstance(train, Stream) and len(train.sizes) > 1):
        check_shapes(arguments)
    flow = KINDS[kind_of(config.flow)[0]](**arguments) if start is None else model_for_size(start, arguments)
    if start is not None:
        arguments = flow.arguments
    loaded = (lambda: vae) if cache is None else (lambda: load_autoencoder(str(cache.autoencoder_folder())))
    text: Callable[[], tuple[Any, Any]] = lambda: (text_encoder, tokenizer)
    if cache is not None and null_cond is not None:  # there is no encoder yet
        text = partial(load_cached_text, config.text, cache.manifest["text"])
    elif config.text.shard:  # or none that is whole
        text = partial(load_text, config.text, ())
    held_out = validation if len(validation) else None
    return Parts(train, held_out, codec, loaded, text, text_encoder, tokenizer, null_cond, flow, arguments)


#: How a run's checkpoints say that its tokenizer is of `vocabulary_places`; those that do not are of `first_places`.
SPREAD = "spread"


def first_places(train: Data, count: int) -> Sequence[int]:
    """Numbers of the first captions, of which tokenizers were made at first."""
    return range(min(count, len(train)))


def vocabulary_places(train: Data, count: int) -> Sequence[int]:
    """Numbers of the captions that a tokenizer is made of. They lie evenly, as what is sorted begins with few words; of what has
    no end, or comes over a network, they are the first."""
    far = isinstance(train, Stream) or (isinstance(train, CachedLatents) and train.remote)
    return first_places(train, count) if far else spread_places(len(train), count)


def frozen_autoencoder(config: RunConfig, parts: Parts) -> str | None:
    """The hash of the autoencoder whose latents are trained on; None for pixels, and of one that is trained along."""
    if isinstance(parts.train, CachedLatents):
        return str(parts.train.manifest["autoencoder"]["hash"])
    if is_joint(config) or parts.codec.vae is None:
        return None
    return autoencoder_hash(parts.codec.vae)


def flow_arguments(config: RunConfig, derived: dict[str, Any], start: Start | None) -> dict[str, Any]:
    """The complete arguments of ``flow``.

    Args:
        config: of the run.
        derived: those that follow from data and encoders.
        start: the pipeline that training starts from.

    Raises:
        ValueError: if others are given than follow.
    """
    _, arguments = kind_of(config.flow)
    for key, value in derived.items():
        if arguments.setdefault(key, value) != value:
            whose, remedy = ("", "leave it out")
            if start is not None:
                whose, remedy = f" of the pipeline {start.name!r}", "fine-tuning cannot change it"
            raise ValueError(f"flow.{key}{whose} is {arguments[key]}, but data and encoders give {value}; {remedy}")
    return arguments


def check_shapes(arguments: dict[str, Any]) -> None:
    """An error if a flow of these arguments has one shape, as the data has several."""
    deep, learned = arguments.get("deep_order"), arguments.get("positions") == "learned"
    given = f"flow.deep_order {deep}" if deep else "flow.positions learned" if learned else "flow.learned_prior true"
    if deep or learned or arguments.get("learned_prior"):
        raise ValueError(
            "the data has pictures of several shapes, which learned positions and priors do not fit: take pictures of one "
            f"shape, or a flow without {given}"
        )


def meaning(parts: Parts) -> dict[str, Any]:
    """The meaning of class and token numbers, for checkpoints: "classes", their names or None; "tokens", those of a
    tokenizer made for the run, a hash for larger ones, or None."""
    names = parts.train.class_names if parts.flow_arguments.get("num_classes") else None
    tokens: Any = None
    if parts.tokenizer is not None:
        numbers = parts.tokenizer.get_vocab()
        tokens = sorted(numbers, key=lambda token: (numbers[token], token))
        if len(tokens) > LISTED_TOKENS:
            tokens = hashlib.sha256("\0".join(tokens).encode(errors="surrogatepass")).hexdigest()
    return {"classes": None if names is None else list(names), "tokens": tokens}


def open_autoencoder(config: RunConfig) -> Any:
    """The run's autoencoder, frozen as yet; None for pixels.

    Raises:
        ValueError: if there is none of that name, or it cannot be trained along as the settings want it.
    """
    if config.vae.name == "new":
        torch.manual_seed(config.train.seed)
        return new_autoencoder(config.joint.model, config.data.image_size).eval().requires_grad_(False)
    vae = load_autoencoder(config.vae.name, config.vae.subfolder)
    if is_joint(config) and not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"vae.train is 'joint', which is for an AutoencoderKL, but {config.vae.name!r} is a {type(vae).__name__}"
        )
    return vae


def sized(train: Stream, config: RunConfig, factor: int) -> Stream:
    """A stream whose pictures are brought to the sizes of ``data.aspect_ratios``, which the flow's patches fit.

    Args:
        train: the stream.
        config: of the run.
        factor: of the autoencoder.

    Raises:
        ValueError: if the autoencoder is trained along, which takes squares.
    """
    ratios = config.data.aspect_ratios
    if ratios is None:
        return train
    if is_joint(config):
        raise ValueError("data.aspect_ratios is set, but vae.train is 'joint', which takes squares: leave it out")
    patch = config.flow.get(
        "patch_size", inspect.signature(KINDS[kind_of(config.flow)[0]]).parameters["patch_size"].default
    )
    sizes = [bucket_size(ratio_of(name), config.data.image_size, factor * patch) for name in ratios]
    return train.with_sizes(list(dict.fromkeys(sizes)))


def held_out_of(train: Data, config: RunConfig) -> Data:
    """The held-out pictures that belong to the training pictures; of a stream the first ones."""
    if not isinstance(train, Stream):
        return open_split(config, "validation", train)
    count = max(config.log.eval_images, config.metric.images if config.metric.every else 0)
    return FirstPictures(Stream(config.data, "validation", config.train.seed, train.sizes), count)


def open_split(config: RunConfig, split: str, beside: Data | None = None) -> Data:
    """A split of the run's data; of pictures in a folder the listing of another one, ``beside``, is used again."""
    if config.data.source == "latents":
        return open_latents(config.data, split)
    if config.data.is_stream:
        return Stream(config.data, split, config.train.seed)
    return Images(config.data, split, beside if isinstance(beside, Images) else None)


def check_conditions(config: RunConfig, train: Data, conditioning: str) -> None:
    """Whether data, text encoder and flow agree on what pictures are drawn from."""
    if conditioning.startswith("class") and train.class_names is None:
        raise ValueError(
            f"flow.conditioning is {conditioning!r}, but the data has no classes (folders or label column): sort the "
            "pictures into a folder for each class, or take a configuration of captions"
        )
    if (conditioning == "prefix") != (config.text.kind != "none"):
        raise ValueError(
            f"flow.conditioning is {conditioning!r} and text.kind is {config.text.kind!r}: captions need 'prefix' and "
            "a text encoder, other conditionings need text.kind 'none'"
        )
    if conditioning == "prefix" and not train.has_captions:
        raise ValueError(
            "the data has no captions: give data.caption_column or a folder with metadata.jsonl, or take a configuration of classes"
        )


def as_cached(config: RunConfig, resolved: str) -> tuple[RunConfig, str]:
    """The settings, and their YAML, with the autoencoder and picture size of the cache where they have the defaults.

    Raises:
        ValueError: if other values are set than the cache was made with.
    """
    manifest = read_manifest(paths_of(config.data)[0])
    if manifest is None:
        return config, resolved  # opening the cache says so
    name, side = manifest["autoencoder"]["name"], manifest["image_size"]
    if config.vae.name not in (name, VaeConfig().name):
        raise ValueError(f"vae.name is {config.vae.name!r}, but the latents were cached with {name!r}")
    if config.data.image_size not in (side, DataConfig.image_size):
        raise ValueError(f"data.image_size is {config.data.image_size}, but the latents are of pictures of {side}")
    vae, data = replace(config.vae, name=name), replace(config.data, image_size=side)
    settings = yaml.safe_load(resolved)
    settings["vae"]["name"], settings["data"]["image_size"] = name, side
    return replace(config, vae=vae, data=data), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def check_cache(config: RunConfig, cache: CachedLatents) -> None:
    """Whether captions were encoded as the settings say."""
    text = cache.manifest["text"]
    encoded = text is not None and config.text.kind == "pretrained"
    if encoded and (difference := settings_difference(text, config.text)):
        raise ValueError(f"the captions were encoded with {difference}: set it so, or cache them anew")
    if text is not None and config.text.shard:
        raise ValueError("text.shard is true, but the captions are cached in encoded form: no encoder is needed")


def make_codec(config: VaeConfig, train: Data, vae: Any, statistics: Any, device: torch.device) -> LatentCodec:
    """The codec with its statistics, measured if need be."""
    if statistics is None and isinstance(train, CachedLatents):
        statistics = train.latents_mean, train.latents_std
    if statistics is None and vae is None:
        return LatentCodec(None)  # pixels
    if statistics is None:
        statistics = measure(vae, train, config.measure_images, device)
    return LatentCodec(vae, *statistics)


def measure(vae: Any, images: Items, count: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the scaled latents of some pictures, see `measure_latents`."""
    batches = (batch for indices in fixed_batches(images, count, 64) for batch in read_batches(images, indices))
    return measure_latents(vae, batches, lambda batch: to_model(batch["image"]).to(device))


def latent_shape(config: RunConfig, train: Data, codec: LatentCodec) -> tuple[int, int]:
    """Channels and side of the latents of a square picture."""
    if isinstance(train, CachedLatents):
        return len(train.latents_mean), train.image_size // train.manifest["factor"]
    pixels = config.data.image_size
    device = None if codec.vae is None else codec.vae.device
    with torch.no_grad():
        shape = codec.encode(torch.zeros(1, 3, pixels, pixels, device=device)).shape
    return shape[1], shape[2]
