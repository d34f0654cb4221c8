"""Training a DiT by flow matching, in the loop that trains flows: the same batches, averages, optimizers, resuming."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tarflow.common.files import replaced
from tarflow.data.latents import CachedLatents
from tarflow.experiments.peers.diffusion import DiffusionModel
from tarflow.experiments.peers.settings import DiffusionConfig
from tarflow.training.flow.config import TextConfig
from tarflow.training.flow.setup import vocabulary_places
from tarflow.training.flow.text import load_text
from tarflow.training.flow.tokens import CaptionTokens
from tarflow.training.loop.batches import fixed_batches, read_batch
from tarflow.training.loop.draws import draw_chances, draw_noise
from tarflow.training.loop.network_task import NetworkTask
from tarflow.training.loop.task import Batch, State
from tarflow.vae.codec import LatentCodec

MODEL = "model.pt"


class DiffusionTask(NetworkTask):
    """What is trained: a `DiffusionModel` on cached latents.

    Args:
        config: of the run.
        accelerator: of the run.
    """

    config: DiffusionConfig
    train: CachedLatents
    network: DiffusionModel
    betas = (0.9, 0.95)

    def __init__(self, config: DiffusionConfig, accelerator: Accelerator):
        super().__init__(config, accelerator, config.folder)

    def make_parts(self, state: State | None) -> None:
        self.train = CachedLatents(self.config.cache, "train")
        self.validation = CachedLatents(self.config.cache, "validation")
        self.codec = LatentCodec(None, self.train.latents_mean, self.train.latents_std)
        torch.manual_seed(self.config.seed)
        self.network, self.tokens = make_model(self.config, self.train)

    def network_invariants(self) -> dict[str, Any]:
        return {f"model.{name}": value for name, value in self.network.transformer.config.items() if name[0] != "_"}

    def inputs(self, batch: Batch, step: int, sample_ids: Sequence[int], drop: bool = True) -> dict[str, Tensor]:
        """What the model takes of a batch: the flow's noise and dropped conditions, times from a logit-normal density."""
        config, device = self.config, self.accelerator.device
        latents = self.codec.normalise(batch["latent_mean"].to(device))
        noise = draw_noise(config.seed, step, sample_ids, self.network.shape, device, "noise")
        chance = draw_chances(config.seed, step, sample_ids, device, "time").clamp(1e-4, 1 - 1e-4)
        found = {"latents": latents, "noise": noise, "time": torch.sigmoid(torch.special.ndtri(chance))}
        dropped = draw_chances(config.seed, step, sample_ids, torch.device("cpu"), "drop") < config.drop_rate * drop
        return found | {name: value.to(device) for name, value in self.conditions(batch, dropped.tolist()).items()}

    def conditions(self, batch: Batch, dropped: Sequence[bool]) -> dict[str, Tensor]:
        """Labels or tokens of a batch, with none where ``dropped``."""
        if self.tokens is None:
            labels = [
                self.network.null_label if drop else int(label)
                for label, drop in zip(batch["label"], dropped, strict=True)
            ]
            return {"class_labels": torch.tensor(labels)}
        captions = ["" if drop else caption for caption, drop in zip(batch["caption"], dropped, strict=True)]
        ids, mask = self.tokens(captions)
        return {"input_ids": ids, "attention_mask": mask}

    def backward(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        loss = self.learner.model(**self.inputs(batch, step, sample_ids))
        self.accelerator.backward(loss)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def measure(self, step: int, last: bool) -> dict[str, Any]:
        """The loss on held-out pictures with noise that stays the same; the last call saves the model."""
        held_out, size = self.validation, self.config.batch_size
        losses, counts = [], []
        if held_out is not None and len(held_out):
            for indices in fixed_batches(held_out, min(self.config.eval_images, len(held_out)), size):
                inputs = self.inputs(read_batch(held_out, indices), -1, indices, drop=False)
                losses.append(float(self.network(**inputs)) * len(indices))
                counts.append(len(indices))
        if last:
            save_model(self.network, self.folder)
        return {"loss": sum(losses) / sum(counts)} if counts else {}


def make_model(config: DiffusionConfig, data: CachedLatents) -> tuple[DiffusionModel, CaptionTokens | None]:
    """A new model for the latents, and its tokens of captions.

    Raises:
        ValueError: if the data have no captions or classes, or latents of several shapes.
    """
    if len(data.shapes) > 1:
        raise ValueError(f"the latents have {len(data.shapes)} shapes: a DiT has one")
    item = data[0]
    channels, side, _ = item["latent_mean"].shape
    if config.condition == "class":
        if not data.class_names:
            raise ValueError("the condition is 'class', but the data have no classes")
        return DiffusionModel(config, channels, side, len(data.class_names)), None
    if not data.has_captions:
        raise ValueError("the condition is 'caption', but the data have no captions")
    text = TextConfig(
        kind="small",
        unit=config.text_unit,
        vocab_size=config.vocab_size,
        vocab_captions=config.vocab_captions,
        width=config.text_width,
        layers=config.text_layers,
        heads=config.text_heads,
        max_length=config.max_length,
    )
    captions = (data.caption(index) or "" for index in vocabulary_places(data, text.vocab_captions))
    encoder, tokenizer = load_text(text, captions)
    return DiffusionModel(config, channels, side, 0, encoder), CaptionTokens(tokenizer, config.max_length)


def save_model(model: DiffusionModel, folder: Path) -> None:
    """Write the weights; the sizes stand in the run's settings, and the tokens come from the cache."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with replaced(folder / MODEL) as temporary:
        torch.save(weights, temporary)


def load_model(config: DiffusionConfig) -> tuple[DiffusionModel, CaptionTokens | None]:
    """The trained model of a run, for drawing, and its tokens of captions."""
    torch.manual_seed(config.seed)
    model, tokens = make_model(config, CachedLatents(config.cache, "train"))
    model.load_state_dict(torch.load(config.folder / MODEL, weights_only=True))
    return model.eval().requires_grad_(False), tokens
