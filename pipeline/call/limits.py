"""How much memory a pipeline's call needs, so that too many images are refused before anything is drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tarflow.flows.layers.config import BlockConfig, TransformerConfig
from tarflow.flows.layers.network import TokenNetwork
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.pipeline.call.parts import PipelineParts
from tarflow.pipeline.call.samples import DECODED_PIXELS, DENOISED_TOKENS

FLOAT32 = 4
#: Float32 copies of the latents while blocks are inverted: noise, tokens in both orders, what is made, log-scales.
LATENT_COPIES = 8
#: Key/value caches of a block that may be there at once: the one that is timed, the one that decodes, and Jacobi's copy
#: of the samples that still change.
CACHES = 3
#: Float32 copies of the finished images: parts, all of them, scaled to [0, 1], as arrays.
IMAGE_COPIES = 4
#: Activations around a convolution that are there at once, of the size of its output: input, norm, work space and so on;
#: measured peaks of the shipped autoencoder take seven.
CONVOLUTION_COPIES = 8


def estimate_bytes(
    pipe: PipelineParts, count: int, guided: bool = True, height: int | None = None, width: int | None = None
) -> int:
    """Bytes that a call needs besides the weights: latents and images, and the largest of its three phases.

    Args:
        pipe: a `TARFlowPipeline`.
        count: how many images.
        guided: whether guidance is on, which doubles the rows of the blocks that see the condition.
        height, width: of the images in pixels; the training size if not given.

    Raises:
        ValueError: for a size that the model cannot draw.
    """
    channels, latent_height, latent_width = pipe.latent_shape(height, width)
    config = pipe.flow.config
    tokens = latent_height * latent_width // config.patch_size**2
    pixels = latent_height * latent_width * pipe.codec.factor**2
    prefix = {"prefix": pipe.config.max_sequence_length, "class_prefix": 1}.get(config.conditioning, 0)
    size = pipe.flow.dtype.itemsize

    latents = LATENT_COPIES * FLOAT32 * count * channels * latent_height * latent_width
    condition = (4 if guided else 2) * size * count * prefix * config.cond_dim
    images = IMAGE_COPIES * FLOAT32 * count * pixels * 3
    networks, chains = list[TokenNetwork](pipe.flow.blocks), 1
    if isinstance(pipe.flow, TrajectoryFlowModel):  # of whose states the score step needs all
        networks, chains = pipe.flow.networks, 1 + max(pipe.flow.config.steps)
    blocks = [network.config for network in networks]
    inverting = max(block_bytes(block, count, tokens, prefix, guided, size) for block in blocks)
    denoised = min(count, max(1, DENOISED_TOKENS // (chains * tokens))) if pipe.config.noise_std > 0 else 0
    denoising = sum(gradient_bytes(block, chains * denoised, tokens, prefix, size) for block in blocks)
    decoded = min(count, max(1, DECODED_PIXELS // pixels))
    decoding = decoded * pixels * decoder_channels(pipe.vae) * CONVOLUTION_COPIES * FLOAT32
    return latents + condition + images + max(inverting, denoising, decoding)


def block_bytes(block: BlockConfig, count: int, tokens: int, prefix: int, guided: bool, size: int) -> int:
    """Of inverting one block: key/value caches, and one layer's activations in a parallel pass."""
    sees_condition = block.conditioning != "none"
    rows = 2 * count if guided and sees_condition else count
    slots = tokens + (prefix if sees_condition else 0)
    transformer = block.transformer
    cache = transformer.layers * rows * 2 * transformer.num_kv_heads * slots * transformer.head_dim * size
    return CACHES * cache + rows * slots * layer_numbers(transformer) * max(size, FLOAT32)


def gradient_bytes(block: BlockConfig, count: int, tokens: int, prefix: int, size: int) -> int:
    """Of a block's part in the score step: what all of its layers keep for the gradient."""
    slots = tokens + (prefix if block.conditioning != "none" else 0)
    transformer = block.transformer
    attention = 2 * count * transformer.num_heads * slots**2 * FLOAT32  # logits and their softmax, where they are kept
    return transformer.layers * (count * slots * layer_numbers(transformer) * max(size, FLOAT32) + attention)


def layer_numbers(layer: TransformerConfig) -> int:
    """Numbers that one Transformer layer makes for a slot: norms, queries, keys, values, attention, MLP."""
    hidden = layer.width * layer.mlp_ratio * (2 if layer.mlp == "geglu" else 1)
    return 10 * layer.width + 2 * hidden


def decoder_channels(vae: Any) -> int:
    """Channels of the decoder's widest layer at the images' full size; 0 without an autoencoder."""
    if vae is None:
        return 0
    config = getattr(vae, "config", {})
    channels = config.get("decoder_block_out_channels") or config.get("block_out_channels") or (128,)
    return max(channels[:2])  # the upsampling to full size still has the next block's channels


def available_bytes(device: torch.device | str) -> int | None:
    """Memory that new work on a device can take; None where that cannot be known."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # as on Windows
        return None


def largest_count(
    pipe: PipelineParts,
    most: int,
    guided: bool = True,
    available: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> int:
    """The largest number of images, at most ``most``, whose call fits the memory; 0 if not even one does.

    Args:
        pipe, guided, height, width: as of `estimate_bytes`.
        available: bytes; None asks the pipeline's device. Where that does not tell, everything fits.
    """
    available = available_bytes(pipe.device) if available is None else available
    if available is None:
        return most
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if estimate_bytes(pipe, middle, guided, height, width) <= available:
            fits = middle
        else:
            too_many = middle
    return fits


def check_num_images(
    pipe: PipelineParts,
    count: int,
    guided: bool = True,
    available: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Refuse a number of images that one call cannot draw.

    Args:
        count, pipe, guided, available, height, width: as of `largest_count`.

    Raises:
        ValueError: for a number below 1, or more than fit the memory; it says how many do.
    """
    if count < 1:
        raise ValueError(f"the number of images must be at least 1, got {count}")
    available = available_bytes(pipe.device) if available is None else available
    fits = largest_count(pipe, count, guided, available, height, width)
    if available is not None and fits < count:
        needed = estimate_bytes(pipe, count, guided, height, width)
        images = "1 image" if count == 1 else f"{count:,} images"
        rest = f"at most {fits:,} fit" if fits else "not even one fits"
        raise ValueError(
            f"{images} at once need about {gigabytes(needed)} of memory, and {gigabytes(available)} are available on "
            f"{str(pipe.device)!r}: {rest}"
        )


def gigabytes(count: int) -> str:
    """Bytes in words, for example "3.2 GB"."""
    return f"{count / 1e9:,.1f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"
