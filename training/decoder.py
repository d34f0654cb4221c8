"""Finetuning a pipeline's decoder: it learns to decode latents with the training noise, while all else stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from tarflow.data.config import DataConfig
from tarflow.data.images import Images, to_model
from tarflow.evaluation.noisy_pictures import NoisyPictures, noisy_pictures
from tarflow.pipeline.folder import add_component, own_folder
from tarflow.pipeline.opening import locate, open_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.config import check
from tarflow.training.draws import draw_chances, draw_noise
from tarflow.training.network_config import NetworkConfig
from tarflow.training.network_trainer import NetworkTrainer, network_accelerator
from tarflow.training.picture_loss import PictureLossConfig
from tarflow.training.picture_step import PictureStepper
from tarflow.vae.codec import weights_hash
from tarflow.vae.decoder import LatentDecoder


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(NetworkConfig):
    """Everything about finetuning a decoder.

    Attributes, besides those of `NetworkConfig`:
        pipeline: folder, shipped name or hub id.
        data: the pictures, of the model's size.
        output: folder of the run: resolved settings, logs, grids, checkpoints. None is ``runs/NAME_decoder``, with the
            name of the pipeline's folder, or of the folder above if it is called "pipeline".
        save_to: folder of the pipeline with its new decoder. None puts the decoder into the pipeline's own folder.
        set_default: the pipeline's calls take the new decoder unless they say otherwise; False leaves their default.
        noise_std: σ of the noise on the latents; None is the pipeline's training noise, which its samples have.
        sample_posterior: noise on draws from the autoencoder's posterior, or else on its means: as the flow was trained
            (``vae.sample_posterior`` there).
        loss: what makes decoded pictures like their originals.
        grid_images: in the grid of each evaluation.
    """

    pipeline: str
    data: DataConfig
    output: str | None = None
    save_to: str | None = None
    set_default: bool = True
    noise_std: float | None = None
    sample_posterior: bool = True
    loss: PictureLossConfig = field(default_factory=PictureLossConfig)
    lr: float = 3e-4
    mixed_precision: Literal["no", "bf16"] = "bf16"
    grid_images: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.grid_images >= 1, f"grid_images must be at least 1, got {self.grid_images}")
        check(self.noise_std is None or self.noise_std >= 0, f"noise_std must be 0 or positive, got {self.noise_std}")

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.data.image_size

    @property
    def folder(self) -> Path:
        """Of the run."""
        if self.output is not None:
            return Path(self.output).expanduser()
        path = Path(self.pipeline).expanduser()
        name = path.parent.name if path.name == "pipeline" and path.parent.name else path.name
        return Path("runs") / f"{name}_decoder"


class DecoderTask:
    """What `NetworkTrainer` trains: a copy of the autoencoder's decoder.

    Args:
        config: of the run.
        accelerator: of the run.

    Raises:
        ValueError: if pipeline, data and settings do not fit.
    """

    def __init__(self, config: DecoderConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        place = locate(config.pipeline)
        self.target = own_folder(config.pipeline, config.save_to)
        self.source = Path(place) if Path(place).is_dir() else Path(TARFlowPipeline.download(place))
        self.pipe = open_pipeline(str(self.source), "cpu")
        if self.pipe.vae is None:
            raise ValueError(f"the pipeline {config.pipeline!r} models pixels: it has no decoder to finetune")
        if config.noise_std is not None:
            self.pipe.register_to_config(noise_std=config.noise_std)
        self.noise_std = self.pipe.config.noise_std
        self.train, held_out = Images(config.data, "train"), Images(config.data, "validation")
        size = self.pipe.flow.config.sample_size * self.pipe.codec.factor
        check(
            config.image_size == size,
            f"the model has pictures of {size} pixels, but data.image_size is {config.image_size}",
        )
        check(len(self.train) > 0, "the data's training split is empty")
        self.encoder_hash = weights_hash(self.pipe.vae)
        self.network = LatentDecoder.from_autoencoder(self.pipe.vae).train().requires_grad_(True)
        self.pipe.vae.to(accelerator.device)
        self.held_out: NoisyPictures | None = None
        self.before: dict[str, list[Tensor]] = {}
        if accelerator.is_main_process and len(held_out):
            self.prepare_held_out(held_out)

    def prepare_held_out(self, images: Images) -> None:
        """Noisy held-out latents, and how they are decoded without the new decoder."""
        self.pipe.to(self.accelerator.device)
        self.held_out = noisy_pictures(self.pipe, images, self.config.eval_images, self.config.batch_size)
        self.before = {name: self.held_out.decoded(self.pipe, name) for name in ("none", "score")}
        for module in (self.pipe.flow, self.pipe.text_encoder):  # they are not needed any more
            if module is not None:
                module.to("cpu")

    @property
    def last_layer(self) -> nn.Parameter:
        return self.network.last_layer

    def facts(self) -> dict[str, Any]:
        return {"the autoencoder's SHA-256": self.encoder_hash, "noise_std": self.noise_std}

    def decode(
        self, model: nn.Module, batch: dict[str, Any], step: int, places: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Latents with noise, decoded, as the flow sees them in its training; no further losses."""
        seed, device, codec = self.config.seed, self.accelerator.device, self.pipe.codec
        images = to_model(batch["image"].to(device, non_blocking=True))
        with torch.no_grad():
            if self.config.data.flip:
                flip, _ = draw_chances(seed, step, places, device)
                images = torch.where(flip[:, None, None, None] < 0.5, images.flip(-1), images)
            with self.accelerator.autocast():
                mean, std = codec.encode_posterior(images)
            noise, of_posterior = draw_noise(seed, step, places, (2, *mean.shape[1:]), device).unbind(1)
            drawn = self.config.sample_posterior and std is not None
            scaled = mean + std * of_posterior if drawn else mean
            raw = codec.raw(codec.normalise(scaled) + self.noise_std * noise)
        return model(raw), images, {}

    @torch.no_grad()
    def report(self, step: int, last: bool) -> dict[str, float]:
        """PSNR and SSIM of noisy held-out latents by the autoencoder's decoder, after the score step and by the new
        decoder, and their grid, a row each below the originals. The last one saves the decoder."""
        metrics: dict[str, float] = {}
        # A copy: Accelerate makes the network itself compute with mixed precision.
        decoder = LatentDecoder.from_config(self.network.config).eval()
        decoder.load_state_dict(self.network.state_dict())
        if self.held_out is not None:
            self.pipe.register_modules(finetuned_decoder=decoder.to(self.accelerator.device))
            pictures = {**self.before, "finetuned": self.held_out.decoded(self.pipe, "finetuned")}
            for name, decoded in pictures.items():
                metrics |= {f"{measure}_{name}": value for measure, value in self.held_out.quality(decoded).items()}
            self.write_grid([self.held_out.originals, *pictures.values()], step)
        if last:
            self.save(decoder)
        return metrics

    def write_grid(self, rows: list[list[Tensor]], step: int) -> None:
        """Write the first pictures of each row of batches."""
        folder = self.config.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        shown = [torch.cat(batches)[: self.config.grid_images] for batches in rows]
        save_image(make_grid(torch.cat(shown).float() / 255, nrow=len(shown[0])), folder / f"decoded_{step:08d}.png")

    def save(self, decoder: LatentDecoder) -> None:
        """Put the decoder into the pipeline's folder, or a copy of it."""
        if self.config.dtype != "float32":
            decoder.to(getattr(torch, self.config.dtype))
        settings = {"decoder": "finetuned"} if self.config.set_default else {}
        add_component(self.source, self.target, "finetuned_decoder", decoder, **settings)
        print(f"the finetuned decoder is in {self.target}")


def finetune_decoder(config: DecoderConfig, resolved: str) -> dict[str, float]:
    """Train, and save the decoder; returns the last metrics.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if settings, pipeline, data or checkpoint do not fit.
        OSError: if a file cannot be written.
    """
    accelerator = network_accelerator(config, config.folder)
    task = DecoderTask(config, accelerator)
    stepper = PictureStepper(config, accelerator, task)
    return NetworkTrainer(config, resolved, config.folder, accelerator, task, stepper).run()
