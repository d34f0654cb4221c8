"""What the trainings of a pipeline's further components share: the pipeline, its pictures, and where the result goes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from tarflow.common.checks import check
from tarflow.data.images import to_model
from tarflow.data.latents import CachedLatents, open_latents
from tarflow.data.stream.first import AnyPictures, open_pictures, open_training
from tarflow.pipeline.loading.folder import add_component, check_same_flow, own_folder
from tarflow.pipeline.opening import locate, open_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.loop.batches import chosen
from tarflow.training.loop.component_config import ComponentConfig
from tarflow.training.loop.draws import draw_noise
from tarflow.training.loop.summary import drawing_line
from tarflow.vae.codec import autoencoder_hash


class ComponentFolders:
    """A pipeline's folder, and the one that gets the component; they may be the same.

    Args:
        config: of the run.

    Raises:
        ValueError: if there is no such pipeline, or the other folder cannot be written to.
    """

    def __init__(self, config: ComponentConfig):
        place = locate(config.pipeline)
        self.target = own_folder(config.pipeline, config.save_to)
        self.source = Path(place) if Path(place).is_dir() else Path(TARFlowPipeline.download(place))
        check_same_flow(self.source, self.target)
        self.dtype = config.dtype

    def open(self, device: torch.device | str) -> TARFlowPipeline:
        """The pipeline, see `open_pipeline`."""
        return open_pipeline(str(self.source), str(device))

    def add(self, name: str, component: nn.Module, **settings: Any) -> None:
        """Write the pipeline with a component of this name, see `add_component`."""
        if self.dtype != "float32":
            component.to(getattr(torch, self.dtype))
        add_component(self.source, self.target, name, component, **settings)
        print(f"the {name.replace('_', ' ')} is in {self.target}")


def samples_posterior(config: ComponentConfig, pipe: TARFlowPipeline) -> bool:
    """Whether noise is put on draws from the autoencoder's posterior. An autoencoder that decodes noisy latents as they are
    (``denoise`` is false) was trained along, unless the user says otherwise."""
    return bool(pipe.config.denoise) if config.sample_posterior is None else config.sample_posterior


def check_posterior(config: ComponentConfig, pipe: TARFlowPipeline) -> None:
    """An error if pictures would get the noise of an autoencoder that was trained along twice: from its posterior, and as the
    training noise."""
    check(
        pipe.config.denoise or not config.sample_posterior,
        f"the autoencoder of {config.pipeline!r} was trained along, and the noise of its posterior is the training noise: set "
        "--sample_posterior null",
    )


def open_splits(config: ComponentConfig, pipe: TARFlowPipeline) -> tuple[AnyPictures, AnyPictures]:
    """Training and held-out pictures; of a stream the first held-out ones.

    Raises:
        ValueError: if they do not fit the pipeline, or there are none to train on.
    """
    train = open_training(config.data, config.seed)
    held_out = open_pictures(config.data, "validation", config.eval_images, "eval_images", config.seed)
    size = pipe.flow.config.sample_size * pipe.codec.factor
    check(
        config.data.image_size == size,
        f"the model has pictures of {size} pixels, but data.image_size is {config.data.image_size}: "
        f"give --data.image_size {size}",
    )
    check(len(train) > 0, "the data's training split is empty")
    return train, held_out


def open_cached_splits(config: ComponentConfig, pipe: TARFlowPipeline) -> tuple[CachedLatents, CachedLatents]:
    """Training and held-out latents of a cache.

    Raises:
        ValueError: if they are another autoencoder's than the pipeline's or of another size, or there are none to train on.
    """
    train, held_out = open_latents(config.data, "train"), open_latents(config.data, "validation")
    check(pipe.vae is not None, f"the model {config.pipeline!r} draws pixels: give pictures instead of cached latents")
    check(
        train.manifest["autoencoder"]["hash"] == autoencoder_hash(pipe.vae),
        f"the latents were encoded by another autoencoder than that of {config.pipeline!r}: cache them with --vae.name "
        f"{shlex.quote(config.pipeline)} --vae.subfolder vae",
    )
    sides, size = train.shapes, pipe.flow.config.sample_size
    check(
        all(tuple(side) == (size, size) for side in sides),
        f"the model has latents of {size} × {size}, but the cache's are {' and '.join(f'{h} × {w}' for h, w in sides)}",
    )
    check(len(train) > 0, "the data's training split is empty")
    return train, held_out


def example_line(pipeline: Path, images: AnyPictures | CachedLatents, conditioning: str, *options: str) -> str:
    """The command that draws from a pipeline, with a caption or class of its training pictures."""
    caption = images.caption(0) if images.has_captions else None
    prompts = [caption or "a caption"] if conditioning == "prefix" else []
    classes = list(images.class_names or ["0"])[:1] if conditioning.startswith("class") else []
    return drawing_line(pipeline, prompts, classes, options)


@torch.no_grad()
def posterior_of(
    pipe: TARFlowPipeline, accelerator: Accelerator, batch: dict[str, Any], flipped: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Means and standard deviations, None if there are none, of the scaled latents (B, C, h, w) of training pictures, which
    may be cached.

    Args:
        pipe: the pipeline, its autoencoder on the accelerator's device.
        flipped: which pictures are mirrored, (B,); None for none.
    """
    if "latent_mean" in batch:
        mean, std = (chosen(batch, name, flipped, accelerator.device) for name in ("latent_mean", "latent_std"))
        return mean, std
    with accelerator.autocast():
        return pipe.codec.encode_posterior(to_model(chosen(batch, "image", flipped, accelerator.device)))


def noisy_latents(
    pipe: TARFlowPipeline,
    config: ComponentConfig,
    posterior: tuple[Tensor, Tensor | None],
    step: int,
    sample_ids: Sequence[int],
) -> Tensor:
    """Normalised latents with the training noise (B, C, h, w), as the flow was trained on them.

    Args:
        posterior: see `posterior_of`.
        step, sample_ids: see `draw_noise`.
    """
    drawn, std = posterior
    shape, device = tuple(drawn.shape[1:]), drawn.device
    if samples_posterior(config, pipe) and std is not None:
        drawn = drawn + std * draw_noise(config.seed, step, sample_ids, shape, device, "posterior")
    noise = draw_noise(config.seed, step, sample_ids, shape, device, "noise")
    return pipe.codec.normalise(drawn).float() + pipe.config.noise_std * noise


def write_rows(rows: list[Tensor], path: Path) -> None:
    """Write uint8 pictures (N, 3, H, W) of each row side by side, as one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(torch.cat(rows).float() / 255, nrow=len(rows[0])), path)
