"""Encodes pictures once: `cache_latents` writes what `tarflow.data.latents.CachedLatents` reads.

Shard k belongs to process k modulo the number of processes and is encoded in batches of its own pictures, so the files
do not depend on how many processes there are, nor on where an earlier run stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tarflow.common.folders import Folder, check_folder_writable, open_folder, scheme_of
from tarflow.common.processes import gather_objects
from tarflow.common.progress import progress_bar, write_line
from tarflow.data.images import Images, collate, to_model
from tarflow.data.shards import FORMAT, read_manifest
from tarflow.pipeline.text.encoding import cut_captions, encode_captions
from tarflow.training.flow.text import cut_sentence, encoder_settings, load_text
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.latent_cache.folder import (
    check_folder,
    finish_folder,
    kept_record,
    prepare_folder,
    start_folder,
    write_shard,
)
from tarflow.training.latent_cache.plan import Plan, difference, make_plan, without_times
from tarflow.training.loop.agreement import agreed
from tarflow.training.loop.parallel import TIMEOUT, processes_on_cpus
from tarflow.vae.codec import (
    LatentCodec,
    autoencoder_hash,
    channel_statistics,
    channel_sums,
    load_autoencoder,
    weights_hash,
)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cache_latents(config: CacheConfig) -> dict[str, Any]:
    """Write a cache, or what is missing of it, with all processes of `accelerate launch`; returns its manifest.

    Raises:
        ValueError: if the settings do not fit together, or the folder holds a cache of other settings.
        OSError: if a file cannot be written; none is left half-written.
    """
    state = PartialState(cpu=processes_on_cpus() or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    if state.num_processes > 1 and scheme_of(config.output) == "memory":
        raise ValueError(f"the output {config.output!r} is of one process alone, but there are {state.num_processes}")
    folder = open_folder(config.output)
    encoder, plan = agreed(state, lambda: open_plan(config, state.device))
    plan = same_plan(plan)

    def prepare() -> None:
        if state.is_main_process:
            check_folder(plan, folder, encoder.codec.vae)
            prepare_folder(folder, encoder.codec.vae)
            start_folder(plan, folder)

    agreed(state, prepare)
    records = agreed(
        state,
        lambda: write_shards(
            plan, encoder, folder, state.process_index, state.num_processes, show_progress=state.is_main_process
        ),
    )
    records = [record for part in gather_objects(records) for record in part]
    agreed(state, lambda: write_manifest(plan, encoder, folder, records) if state.is_main_process else None)
    return read_manifest(folder) or {}


def open_plan(config: CacheConfig, device: torch.device) -> tuple[Encoder, Plan]:
    """Load the encoders and open the pictures.

    Raises:
        ValueError: if they cannot be, or the folder cannot be written to.
    """
    check_folder_writable(config.output)
    encoder = Encoder(config, device)
    return encoder, make_plan(config, encoder.codec.factor, autoencoder_hash(encoder.codec.vae), encoder.text)


def same_plan(plan: Plan) -> Plan:
    """The first process's plan. Machines with copies of the data may have other times of its files, but nothing else.

    Raises:
        ValueError: if the processes see different pictures or settings.
    """
    all_settings = gather_objects(plan.settings)
    for settings in all_settings:
        if without_times(settings) != without_times(all_settings[0]):
            raise ValueError(f"the processes see different data: {difference(settings, all_settings[0])}")
    return replace(plan, settings=all_settings[0])


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


class SizedImages(Dataset[dict[str, Any]]):
    """Pictures by number in the source, height and width."""

    def __init__(self, images: dict[str, Images]):
        self.images = images

    def __getitem__(self, key: tuple[str, int, int, int]) -> dict[str, Any]:
        split, index, height, width = key
        return self.images[split].fitted(index, height, width)


def write_shards(
    plan: Plan, encoder: Encoder, folder: Folder, process: int = 0, processes: int = 1, show_progress: bool = False
) -> list[dict[str, Any]]:
    """Write the shards of one process that are not there yet; returns the manifest's records of all its shards."""
    mine = plan.shards[process::processes]
    earlier = read_manifest(folder)
    known = {} if earlier is None else {record["file"]: record["sha256"] for record in earlier["shards"]}
    records = {shard.file: kept_record(plan, shard, folder, known.get(shard.file)) for shard in mine}
    missing = [shard for shard in mine if records[shard.file] is None]
    size = plan.config.batch_size
    keys = [
        [(shard.split, index, *shard.size) for index in shard.indices[start : start + size]]
        for shard in missing
        for start in range(0, len(shard.indices), size)
    ]
    loader = DataLoader(
        SizedImages(plan.images), batch_sampler=keys, collate_fn=collate, num_workers=plan.config.num_workers
    )
    total, left = (sum(len(shard.indices) for shard in shards) for shards in (mine, missing))
    batches = iter(loader)
    with progress_bar(total=total, initial=total - left, unit=" images", disable=not show_progress) as progress:
        for shard in missing:
            parts = islice(batches, -(-len(shard.indices) // size))
            tensors, more = encode_shard(encoder, parts, progress)
            header = {**plan.header(shard), **more}
            records[shard.file] = write_shard(folder, shard.file, tensors, header)
    return [record for record in records.values() if record is not None]


def encode_shard(
    encoder: Encoder, batches: Iterator[dict[str, Any]], progress: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one shard, and what its header tells of them: sums for the statistics, skipped pictures.

    Raises:
        ValueError: if latents or encoded captions are too large for the type that they are stored in.
    """
    config = encoder.config
    dtype = getattr(torch, config.dtype)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    texts: list[Tensor] = []
    conds: list[Tensor] = []
    skipped: set[str] = set()
    cut: list[tuple[str, str]] = []
    sums = torch.zeros(3, 1, dtype=torch.float64)
    for batch in batches:
        found = encoder.latents(batch["image"])
        sums = sums + channel_sums(found["latent_mean"])
        if config.flip:
            found |= {f"{key}_flipped": value for key, value in encoder.latents(batch["image"].flip(-1)).items()}
        for key, value in found.items():
            parts[key].append(value.to(dtype))
        if "label" in batch:
            parts["label"].append(batch["label"])
        captions = batch.get("caption", [])
        texts += [torch.tensor(list(caption.encode("utf-8")), dtype=torch.uint8) for caption in captions]
        if encoder.text is not None:
            conds += [cond.to(dtype) for cond in encoder.captions(captions)]
            cut += encoder.cut(captions)
        skipped.update(batch["skipped"])
        progress.update(len(batch["image"]))
    # Convolutions may give channels-last tensors, which safetensors does not take.
    tensors = {key: torch.cat(values).contiguous() for key, values in parts.items()}
    if texts:
        tensors["caption_bytes"], tensors["caption_offsets"] = torch.cat(texts), offsets(texts)
    if conds:
        tensors["cond"], tensors["cond_offsets"] = torch.cat(conds), offsets(conds)
        tensors["null_cond"] = encoder.captions([""])[0].to(dtype)
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} is not finite in {config.dtype}: take bfloat16 or float32, and mixed_precision no")
    shape = list(tensors["latent_mean"].shape[2:])
    example = min(skipped, default=None)
    more = {"cut": len(cut), "cut_example": cut[0]} if cut else {}
    return tensors, {"shape": shape, "sums": sums.tolist(), "skipped": len(skipped), "example": example, **more}


def offsets(parts: list[Tensor]) -> Tensor:
    """Where each of N parts begins in their concatenation, and its end: (N + 1,)."""
    return torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)


def write_manifest(plan: Plan, encoder: Encoder, folder: Folder, records: list[dict[str, Any]]) -> None:
    """Write the manifest of a complete cache and report skipped pictures.

    Args:
        records: of all processes, in any order.
    """
    config = plan.config
    by_file = {record["file"]: record for record in records}
    records = [by_file[shard.file] for shard in plan.shards]
    sums = [torch.tensor(record["sums"], dtype=torch.float64) for record in records if record["split"] == "train"]
    mean, std = channel_statistics(torch.stack(sums).sum(0))
    names = plan.images["train"].class_names
    text, cut = encoder.text, [record for record in records if record.get("cut")]
    if cut:
        count, total = sum(record["cut"] for record in cut), sum(plan.counts.values())
        text = {**(text or {}), "cut": {"count": count, "of": f"{total} captions", "example": cut[0]["cut_example"]}}
        write_line(cut_sentence(count, f"{total} captions", config.text.max_length, cut[0]["cut_example"]))
    kept = ("file", "split", "shape", "first", "count", "bytes", "sha256")
    manifest = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "pictures": plan.counts,
        "image_size": config.data.image_size,
        "autoencoder": {"name": config.vae.name, "class": type(encoder.codec.vae).__name__}
        | plan.settings["autoencoder"],
        "factor": encoder.codec.factor,
        "latent_channels": len(mean),
        "latents_mean": mean,
        "latents_std": std,
        "dtype": config.dtype,
        "flip": config.flip,
        "has_captions": plan.images["train"].has_captions,
        "text": text,
        "class_names": None if names is None else list(names),
        "skipped": sum(record["skipped"] for record in records),
        "versions": {name: version(name) for name in ("tarflow", "torch", "diffusers", "transformers", "safetensors")},
        "settings": plan.settings,
        "shards": [{key: record[key] for key in kept} for record in records],
    }
    finish_folder(folder, manifest)
    if manifest["skipped"]:
        example = min(record["example"] for record in records if record["example"])
        write_line(f"{manifest['skipped']} unreadable images were skipped, for example: {example}")
