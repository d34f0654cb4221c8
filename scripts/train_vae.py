"""Train a small AutoencoderKL and save it in Diffusers' format.

    accelerate launch scripts/train_vae.py --config configs/vae_drawings_emoji.yaml [--section.key value]

The loss is L1 + MSE on pixels in [−1, 1] plus a small Kullback–Leibler term per latent number. The exponential
moving average of the weights is what is evaluated and saved.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid, save_image
from tqdm.auto import tqdm

from tarflow.data.config import DataConfig
from tarflow.data.images import Images, collate, to_model, to_uint8
from tarflow.training.parallel import processes_on_cpus


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of pictures. ``share``: how often it is drawn from, relative to the other sources."""

    data: DataConfig
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig:
    """Settings of a training run.

    Attributes:
        output: folder for the autoencoder; grids and metrics go to ``output`` + "_run".
        model: arguments of Diffusers' ``AutoencoderKL``.
        sources: where pictures come from, by name.
        kl_weight: weight of the KL divergence (nats per latent number, mean).
        dtype: of the saved weights.
    """

    output: str
    model: dict[str, Any]
    sources: dict[str, SourceConfig]
    steps: int = 2400
    batch_size: int = 32
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    kl_weight: float = 1e-3
    ema_decay: float = 0.999
    mixed_precision: str = "bf16"
    dtype: str = "float16"
    eval_every: int = 400
    eval_images: int = 256
    seed: int = 0
    card: str = ""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")


class Mixture(Dataset):
    """Endless mixture of sources: item i is a pure function of the seed and i."""

    def __init__(self, sources: list[Images], shares: list[float], seed: int, length: int):
        self.sources, self.seed, self.length = sources, seed, length
        self.shares = np.array(shares) / sum(shares)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        source = self.sources[int(rng.choice(len(self.sources), p=self.shares))]
        item = source[int(rng.integers(len(source)))]
        if source.config.flip and rng.random() < 0.5:
            item["image"] = item["image"].flip(-1)
        return {"image": item["image"], "skipped": item["skipped"]}


class Reconstruction(nn.Module):
    """Encode, sample the posterior and decode in one forward, as distributed training wants it."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> tuple[Any, torch.Tensor]:
        posterior = self.vae.encode(images).latent_dist
        return posterior, self.vae.decode(posterior.sample()).sample.float()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor, batch_size: int) -> tuple[float, torch.Tensor]:
    """Mean peak signal-to-noise ratio in dB of 8-bit reconstructions, and the reconstructions (N, 3, S, S) uint8."""
    outputs = []
    for batch in images.split(batch_size):
        decoded = vae.decode(vae.encode(to_model(batch)).latent_dist.mode()).sample
        outputs.append(to_uint8(decoded))
    reconstructions = torch.cat(outputs)
    error = (reconstructions.float() - images.float()).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-2)
    return float((10 * torch.log10(255**2 / error)).mean()), reconstructions


def evaluate(vae: AutoencoderKL, held_out: dict[str, torch.Tensor], batch_size: int, folder: Path) -> dict[str, float]:
    """PSNR by source; writes a grid of originals above reconstructions for each."""
    metrics = {}
    for name, images in held_out.items():
        metrics[f"psnr_{name}"], reconstructions = psnr(vae, images, batch_size)
        rows = torch.cat([part for i in (0, 8) for part in (images[i : i + 8], reconstructions[i : i + 8])])
        save_image(make_grid(rows.float() / 255, nrow=8), folder / f"{name}.png")
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = jsonargparse.ArgumentParser(description=__doc__, formatter_class=jsonargparse.DefaultHelpFormatter)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainVaeConfig, None, fail_untyped=False)
    arguments = parser.instantiate(parser.parse_args(argv))
    del arguments["config"]
    train(TrainVaeConfig(**vars(arguments)))


def train(config: TrainVaeConfig) -> None:
    accelerator = Accelerator(cpu=processes_on_cpus(), mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    output = Path(config.output)
    run = output.with_name(output.name + "_run")
    run.mkdir(parents=True, exist_ok=True)

    sources = {name: Images(source.data, "train") for name, source in config.sources.items()}
    shares = [source.share for source in config.sources.values()]
    total = config.steps * config.batch_size * accelerator.num_processes
    loader = DataLoader(
        Mixture(list(sources.values()), shares, config.seed, total), config.batch_size, collate_fn=collate
    )
    held_out = {}
    for name, source in config.sources.items():
        pictures = Images(source.data, "validation")
        held_out[name] = torch.stack([pictures[i]["image"] for i in range(min(config.eval_images, len(pictures)))])
        held_out[name] = held_out[name].to(accelerator.device)

    vae = Reconstruction(AutoencoderKL(**config.model))
    ema = EMAModel(vae.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(vae.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config.warmup_steps, 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1)))),
    )
    vae, optimizer, loader = accelerator.prepare(vae, optimizer, loader)
    ema.to(accelerator.device)
    progress = tqdm(total=config.steps, disable=not accelerator.is_main_process)
    for step, batch in enumerate(loader, start=1):
        images = to_model(batch["image"])
        with accelerator.autocast():
            posterior, decoded = vae(images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = decoded - images
        loss = error.abs().mean() + error.pow(2).mean() + config.kl_weight * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(vae.parameters())
        progress.update()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}", l1=f"{error.abs().mean():.4f}")
        if step % config.eval_every == 0 or step == config.steps:
            model = accelerator.unwrap_model(vae)
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            if accelerator.is_main_process:
                metrics = evaluate(model.vae.eval(), held_out, config.batch_size, run)
                metrics |= {"step": step, "kl": kl.item()}
                tqdm.write(json.dumps(metrics))
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
                save(model.vae, output, config)
            model.train()
            ema.restore(vae.parameters())
    progress.close()


def save(vae: AutoencoderKL, output: Path, config: TrainVaeConfig) -> None:
    """Write the autoencoder beside its place and move it there, so that the folder is whole or not there."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    saved = AutoencoderKL(**config.model)
    saved.load_state_dict(vae.state_dict())
    saved.to(getattr(torch, config.dtype)).save_pretrained(temporary)
    if config.card:
        (temporary / "README.md").write_text(config.card)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)


if __name__ == "__main__":
    main()
