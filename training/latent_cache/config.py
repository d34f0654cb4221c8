"""Settings of a cache of latents."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from tarflow.common.checks import AtLeastOne, Count, check, check_ranges
from tarflow.data.config import DataConfig
from tarflow.training.flow.config import TextConfig, VaeConfig


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to cache.

    Attributes:
        output: folder of the cache, or a URL that fsspec can write to (``s3://``, ``gs://``, ``hf://`` …); several machines
            need one that they share.
        data: the pictures; ``flip`` there has no effect, see below.
        vae: the autoencoder; ``measure_images`` has no effect, as all training pictures are measured.
        text: kind "pretrained" caches encoded captions too, "none" and "small" the captions alone.
        flip: encode the mirrored pictures too.
        shard_size: pictures per file. A shard is held in memory, with encoded captions perhaps gigabytes.
        batch_size: pictures that are encoded at once.
        dtype: of the latents and encoded captions in the files.
        mixed_precision: of the autoencoder while encoding; its results differ from full precision.
        aspect_ratios: None makes squares of ``data.image_size``. A list of width:height, such as ["1:1", "4:3", "3:4"],
            gives each picture the nearest ratio, at about the area of the square. It takes a first pass over the head
            of every picture file, in every process (an orientation that comes after a PNG's pixels is not seen there).
        unit: both sides of all pictures are multiples of the autoencoder's factor times this, the patch size.
        num_images: how many training pictures, from the first on; None takes all. Endless sources need a number.
        num_validation_images: how many held-out pictures, likewise.
        num_workers: processes that read pictures, for each process that encodes; of streams threads.

    Of a stream each row is cached once, with the caption that it has in the first pass.
    """

    output: str
    data: DataConfig
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    flip: bool = False
    shard_size: AtLeastOne = 4096
    batch_size: AtLeastOne = 64
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    aspect_ratios: list[str] | None = None
    unit: AtLeastOne = 1
    num_images: AtLeastOne | None = None
    num_validation_images: Count | None = None
    num_workers: Count = 0

    def __post_init__(self) -> None:
        check(not self.vae.pixels, "vae.name is none: without an autoencoder there is nothing to cache")
        check(
            self.vae.train == "frozen", "vae.train is 'joint': latents of an autoencoder that learns cannot be cached"
        )
        check(self.data.source != "latents", "data.source is 'latents': a cache is made of pictures")
        check_ranges(self)
        if self.data.is_stream:
            check(
                self.num_images is None and self.num_validation_images is None,
                "num_images is for data that is not a stream: a stream is cached whole; name fewer shards",
            )
            check(self.data.aspect_ratios is None, "data.aspect_ratios is for training; of a cache it is aspect_ratios")
        check(self.aspect_ratios != [], "aspect_ratios is empty: name at least one, or none (null) for squares")
        for name in self.aspect_ratios or ():
            correct = re.fullmatch(r"[1-9]\d*:[1-9]\d*", name)
            check(bool(correct), f"aspect_ratios must be like 4:3 (width:height), got {name!r}")
