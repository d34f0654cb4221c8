"""Names of weight files, as Diffusers and Transformers give them."""

from __future__ import annotations

import re
from dataclasses import dataclass

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
#: Formats of weights that are read here; other files with such endings are no weights of a pipeline.
FORMATS = ("safetensors", "bin")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


@dataclass(frozen=True)
class WeightFile:
    """What a weight file's name says, an index of shards included.

    Attributes:
        stem: the name's first part, for example "diffusion_pytorch_model".
        variant: for example "fp16", or None.
        format: one of `FORMATS`.
    """

    stem: str
    variant: str | None
    format: str


def weight_file(name: str) -> WeightFile | None:
    """What a file's name says about the weights in it; None for all other files.

    Args:
        name: without its folder, for example "model.fp16-00001-of-00002.safetensors" or
            "diffusion_pytorch_model.safetensors.index.fp16.json".
    """
    parts = [SHARD.sub("", part) for part in name.split(".")]
    stem, rest = parts[0], parts[1:]
    index = len(rest) >= 3 and rest[-1] == "json" and rest[1] == "index"
    if stem not in STEMS or not rest or not (index or rest[-1] in FORMATS):
        return None
    kind = rest[0] if index else rest[-1]
    if kind not in FORMATS:
        return None
    middle = rest[2:-1] if index else rest[:-1]
    return WeightFile(stem, ".".join(middle) or None, kind)


def superseded(old: list[str], new: list[str]) -> list[str]:
    """Files of ``old`` that a loader would read together with, or instead of, the weights in ``new``: those with the same
    stem and variant, in any format and number of shards.

    Args:
        old: names of files that are in a folder.
        new: names of files that were written there together; what they replace is none of the result.
    """
    written = {(file.stem, file.variant) for file in map(weight_file, new) if file is not None}
    found = ((name, weight_file(name)) for name in old if name not in new)
    return sorted(name for name, file in found if file is not None and (file.stem, file.variant) in written)
