"""Likelihood of held-out pictures under a saved pipeline.

    tarflow evaluate likelihood --pipeline runs/NAME/pipeline --data.source folder --data.path pictures.zip

A model of pixels gives bits per dimension of the 8-bit pictures; one of latents gives nats per latent dimension, which
say nothing about pixels and can be compared only between models of the same latents and noise.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from tarflow.cli.parsing import read_settings
from tarflow.common.checks import AtLeastOne, Positive, at_least, check_ranges
from tarflow.common.command import ending
from tarflow.common.files import check_writable, write_json
from tarflow.common.words import counted
from tarflow.data.config import DataConfig
from tarflow.evaluation.samples.settings import Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """What to evaluate.

    Attributes:
        pipeline: folder, shipped name or hub id.
        data: the pictures; its image_size must be the model's.
        split: "train" or "validation".
        num_images: how many, from the first on; None takes all.
        draws: of noise for each picture.
        importance: draws K of the importance-weighted bound for models of pixels; 0 leaves it out.
        condition: "data" gives the model the labels or captions that it takes, "none" none.
        batch_size: pictures at once.
        seed: of the noise.
        noise_level: of a flow of many levels, that of the noise in what the likelihood is of; None is its highest.
        output: JSON file for the result.
    """

    pipeline: str
    data: DataConfig
    split: Literal["train", "validation"] = "validation"
    num_images: AtLeastOne | None = 1024
    draws: AtLeastOne = 4
    importance: Annotated[int, at_least(0)] = 0
    condition: Literal["data", "none"] = "data"
    batch_size: AtLeastOne = 64
    seed: Seed = 0
    noise_level: Positive | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        self.data.check_count(self.num_images, "num_images")


def main(
    argv: list[str] | None = None, prog: str = "tarflow evaluate likelihood", description: str | None = __doc__
) -> None:
    """Evaluate and print; errors end as `ending` says.

    Args:
        argv: the settings; None takes those of the command line.
        prog, description: how the help calls this, and what it says of it.
    """
    with ending():
        config, _ = read_settings(LikelihoodConfig, argv, description, prog, check_place)
        from tarflow.common.progress import announce
        from tarflow.data.stream.first import open_pictures
        from tarflow.evaluation.likelihood.held_out import evaluate_likelihood
        from tarflow.pipeline.opening import open_pipeline

        pipe = open_pipeline(config.pipeline)
        images = open_pictures(config.data, config.split, config.num_images, "num_images", config.seed)
        count = len(images) if config.num_images is None else min(config.num_images, len(images))
        draws = max(config.draws, config.importance)
        announce(
            f"{count:,} pictures, {draws} draws of noise each: on a CPU that takes minutes, --num_images takes fewer"
        )
        result = evaluate_likelihood(
            pipe,
            images,
            config.num_images,
            config.draws,
            config.importance,
            config.condition == "data",
            config.batch_size,
            config.seed,
            config.noise_level,
        )
        print(report(result, pipe.config.noise_std), flush=True)  # first: what is printed is not lost
        if config.output is not None:
            about = dataclasses.asdict(result) | {"settings": dataclasses.asdict(config)}
            write_json(config.output, about, nan_as_null=True)


def check_place(config: LikelihoodConfig) -> None:
    """Whether the result can be written.

    Raises:
        ValueError: if not.
    """
    if config.output is not None:
        check_writable(config.output)


def report(result: Any, noise_std: float) -> str:
    """A `Likelihood` in words."""
    spread = f" ± {result.standard_error:.4f}" if result.images > 1 else ""
    if result.name == "bits_per_dim":
        lines = [f"bits per dimension (8-bit pixels)   {result.mean:.4f}{spread}"]
        if result.bound is not None:
            lines.append(f"importance-weighted bound           {result.bound:.4f} ± {result.bound_error:.4f}")
    else:
        what, noise_std = "pixel" if result.name.startswith("pixel") else "latent", result.noise_level or noise_std
        lines = [
            f"{f'nats per {what} dimension':<36}{result.mean:.4f}{spread}",
            f"of {what}s with noise of standard deviation {noise_std}; not comparable with bits per dimension of pixels",
        ]
    counts = f"{counted(result.images, 'picture')}, {counted(result.draws, 'draw')} of noise each"
    lines.append(f"standard errors over {counts}" if result.images > 1 else f"{counts}: no standard error")
    if result.draw_error is not None:
        lines.append(f"standard error from the noise alone {result.draw_error:.1e}")
    return "\n".join(lines)
