"""Batches of pictures to what a shard stores of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.data.images import to_model
from tarflow.pipeline.text.encoding import cut_captions, encode_captions
from tarflow.training.flow.text import encoder_settings, load_text
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.vae.codec import LatentCodec, channel_sums, load_autoencoder, weights_hash

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder:
    """The frozen autoencoder and text encoder on a device: batches of pictures to what a shard stores of them.

    Attributes:
        codec: of the autoencoder.
        text: what the text encoder is, for the manifest; None if captions are not encoded.
    """

    def __init__(self, config: CacheConfig, device: torch.device):
        self.config, self.device = config, device
        self.codec = LatentCodec(load_autoencoder(config.vae.name, config.vae.subfolder).to(device))
        self.text_encoder = self.tokenizer = self.text = None
        if config.text.kind == "pretrained":
            self.text_encoder, self.tokenizer = load_text(config.text, ())
            self.text_encoder.to(device)
            self.text = {**encoder_settings(config.text), "hash": weights_hash(self.text_encoder)}

    @torch.no_grad()
    def latents(self, images: Tensor) -> dict[str, Tensor]:
        """Posterior mean and, if there is one, standard deviation of pictures (B, 3, H, W) uint8, float32 (B, C, h, w).

        Both are of the latents that are scaled by the autoencoder's factors; they lie on the CPU.
        """
        kind = AUTOCAST.get(self.config.mixed_precision)
        with nullcontext() if kind is None else torch.autocast(self.device.type, kind):
            mean, std = self.codec.encode_posterior(to_model(images.to(self.device)))
        found = {"latent_mean": mean.cpu()}
        return found if std is None else {**found, "latent_std": std.cpu()}

    @torch.no_grad()
    def captions(self, captions: list[str]) -> list[Tensor]:
        """Each caption's encoding (rows, E), without the zeros of its padding at the end."""
        text = self.config.text
        encoded = encode_captions(self.text_encoder, self.tokenizer, captions, text.max_length, text.options).cpu()
        rows = torch.arange(1, encoded.shape[1] + 1)
        lengths = (encoded.ne(0).any(-1) * rows).amax(1)  # (B,): the last row that is not zero
        return [one[:length] for one, length in zip(encoded, lengths.tolist(), strict=True)]

    def cut(self, captions: list[str]) -> list[tuple[str, str]]:
        """Captions that are too long, see `cut_captions`."""
        return cut_captions(self.tokenizer, captions, self.config.text.max_length, self.config.text.options)


@dataclass(frozen=True)
class Encoded:
    """A batch of B pictures, encoded.

    Attributes:
        tensors: latents and labels (B, …), as they are stored.
        texts: each caption's bytes.
        conds: each encoded caption (rows, E).
        sums: of the latents, see `channel_sums`.
        skipped: what was left out.
        cut: captions that are too long, see `cut_captions`.
    """

    tensors: dict[str, Tensor]
    texts: list[Tensor]
    conds: list[Tensor]
    sums: Tensor
    skipped: set[str]
    cut: list[tuple[str, str]]

    @property
    def count(self) -> int:
        return len(self.tensors["latent_mean"])


def encode(encoder: Encoder, batch: dict[str, Any], progress: Any) -> Encoded:
    """Encode a batch as `tarflow.data.images.collate` makes it, and tell the progress bar."""
    config = encoder.config
    dtype = getattr(torch, config.dtype)
    found = encoder.latents(batch["image"])
    sums = channel_sums(found["latent_mean"])
    if config.flip:
        found |= {f"{key}_flipped": value for key, value in encoder.latents(batch["image"].flip(-1)).items()}
    tensors = {key: value.to(dtype) for key, value in found.items()}
    if "label" in batch:
        tensors["label"] = batch["label"]
    captions = batch.get("caption", [])
    texts = [torch.tensor(list(caption.encode("utf-8")), dtype=torch.uint8) for caption in captions]
    conds: list[Tensor] = []
    cut: list[tuple[str, str]] = []
    if encoder.text is not None:
        conds, cut = [cond.to(dtype) for cond in encoder.captions(captions)], encoder.cut(captions)
    progress.update(len(batch["image"]))
    return Encoded(tensors, texts, conds, sums, set(batch["skipped"]), cut)


def joined(encoder: Encoder, batches: Sequence[Encoded]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one shard, and what its header tells of them: sums for the statistics, skipped pictures.

    Raises:
        ValueError: if latents or encoded captions are too large for the type that they are stored in.
    """
    config = encoder.config
    # Convolutions may give channels-last tensors, which safetensors does not take.
    tensors = {key: torch.cat([batch.tensors[key] for batch in batches]).contiguous() for key in batches[0].tensors}
    texts = [text for batch in batches for text in batch.texts]
    conds = [cond for batch in batches for cond in batch.conds]
    if texts:
        tensors["caption_bytes"], tensors["caption_offsets"] = torch.cat(texts), offsets(texts)
    if conds:
        tensors["cond"], tensors["cond_offsets"] = torch.cat(conds), offsets(conds)
        tensors["null_cond"] = encoder.captions([""])[0].to(getattr(torch, config.dtype))
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} is not finite in {config.dtype}: take bfloat16 or float32, and mixed_precision no")
    shape = list(tensors["latent_mean"].shape[2:])
    sums = torch.zeros(3, 1, dtype=torch.float64)
    for batch in batches:
        sums = sums + batch.sums
    skipped = {message for batch in batches for message in batch.skipped}
    cut = [one for batch in batches for one in batch.cut]
    more = {"cut": len(cut), "cut_example": cut[0]} if cut else {}
    example = min(skipped, default=None)
    return tensors, {"shape": shape, "sums": sums.tolist(), "skipped": len(skipped), "example": example, **more}


def offsets(parts: list[Tensor]) -> Tensor:
    """Where each of N parts begins in their concatenation, and its end: (N + 1,)."""
    return torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
