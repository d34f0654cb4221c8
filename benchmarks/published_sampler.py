"""How the published code samples, as a baseline for speed: every block token by token, in eager mode.

At each step STARFlow's code rotates the cached keys of all slots again, makes an attention mask, and keeps two rows of
everything in guided blocks; TARFlow's code, which has no rotation, appends to its cache by concatenation. The numbers
are those of `tarflow.flows.decoding.sampling.decode`.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.decoding.method import InversionState
from tarflow.flows.layers.affine import log_scale_of, soft_clip
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder, restore


class PublishedCache:
    """Keys and values of one block's layers: preallocated with rotary positions, grown by concatenation without."""

    def __init__(self, block: Any, rows: int, slots: int, dtype: torch.dtype):
        shape = (2, rows, block.config.transformer.num_kv_heads, slots, block.config.transformer.head_dim)
        grows = block.config.positions == "learned"
        self.layers: list[Any] = [  # (2, R, K, S, d), or a tuple of two of (R, K, S, d)
            None if grows else torch.zeros(shape, dtype=dtype, device=block.proj_in.weight.device) for _ in block.layers
        ]
        self.length = [0] * len(block.layers)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.length[layer], self.length[layer] + k.shape[2]
        self.length[layer] = end
        stored = self.layers[layer]
        if stored is None or isinstance(stored, tuple):
            old = stored or (k[:, :, :0], v[:, :, :0])
            self.layers[layer] = torch.cat([old[0], k], dim=2), torch.cat([old[1], v], dim=2)
            return self.layers[layer]
        stored[0][:, :, start:end], stored[1][:, :, start:end] = k, v
        return stored[0][:, :, :end], stored[1][:, :, :end]


def attention(module: Any, x: Tensor, rotation: Any, cache: PublishedCache, layer: int, temperature: Any) -> Tensor:
    """One layer's attention, (R, S, D)."""
    rows, slots, _ = x.shape
    sizes = [count * module.head_dim for count in (module.heads, module.kv_heads, module.kv_heads)]
    q, k, v = (
        part.view(rows, slots, -1, module.head_dim).transpose(1, 2)
        for part in module.qkv(module.norm(x)).split(sizes, dim=-1)
    )
    if module.query_norm is not None:
        q, k = module.query_norm(q), module.key_norm(k)
    k, v = cache.write(layer, k, v)
    if rotation is not None:
        end = k.shape[2]
        q, k = (
            rotate_pairs(part, tuple(table[first:end] for table in rotation))
            for part, first in ((q, end - slots), (k, 0))
        )
    if module.heads != module.kv_heads:
        k, v = (part.repeat_interleave(module.heads // module.kv_heads, dim=1) for part in (k, v))
    if temperature is not None:
        q = q / temperature
    mask = None
    if rotation is not None and slots < k.shape[2]:  # a causal mask at each step, also for a single query
        mask = torch.ones(slots, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - slots)
    causal = mask is None and slots > 1
    scale = 1 / math.sqrt(module.head_dim)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    y = module.proj(y.transpose(1, 2).reshape(rows, slots, -1))
    return y if module.post_norm is None else module.post_norm(y)


def rotate_pairs(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x₀, x₁) of the last axis: x·cos + (−x₁, x₀)·sin; tables (S, d), two equal numbers a pair."""
    cos, sin = tables
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin).to(x.dtype)


@torch.no_grad()
def decode_as_published(
    block: Any,
    z: Tensor,
    grid: tuple[int, int],
    cond: Tensor | None = None,
    null_cond: Tensor | None = None,
    guidance: Guidance | None = None,
    deadline: float = math.inf,
) -> Tensor:
    """Invert one block; returns x (B, T, C), row-major.

    Args:
        deadline: by `time.perf_counter`.
        others: as of `tarflow.flows.decoding.sampling.decode`.

    Raises:
        TimeoutError: at the deadline.
    """
    run = InversionState(block, len(z), grid, cond, null_cond, guidance, cached=False)
    context, batch, tokens = run.context, run.batch, run.num_tokens
    z = run.doubled(reorder(z, block.config.order, grid))
    rotation = None
    if context.rotation is not None:
        rotation = tuple(table[:, 1::2].repeat_interleave(2, dim=1) for table in context.rotation)
    cache = PublishedCache(block, len(z), context.prefix_length + tokens, block.proj_in.weight.dtype)

    def layers(hidden: Tensor) -> Tensor:
        for index, layer in enumerate(block.layers):
            hidden = hidden + attention(layer.attention, hidden, rotation, cache, index, run.temperature)
            hidden = hidden + layer.mlp(hidden)
        return hidden

    if context.prefix is not None:
        layers(context.prefix)
    x = z.clone()
    for token in range(run.first, tokens):
        if time.perf_counter() > deadline:
            raise TimeoutError(
                f"the published algorithm was at token {token} of {tokens} in a block when its time was up"
            )
        hidden = block.proj_in(block.slot_inputs(x, grid, token, token + 1).to(block.proj_in.weight.dtype))
        if context.added is not None:
            hidden = hidden + context.added[:, token - run.first : token - run.first + 1]
        hidden = layers(hidden)
        if block.final_norm is not None:
            hidden = block.final_norm(hidden)
        out = soft_clip(block.proj_out(hidden).float(), block.config.soft_clip)
        raw, shift = (torch.zeros_like(out), out) if block.config.scale == "additive" else out.chunk(2, dim=-1)
        log_scale = log_scale_of(raw, "exp" if block.config.scale == "additive" else block.config.scale)
        shift, log_scale = (run.doubled(part) for part in run.combined((shift, log_scale), token))
        x[:, token] = z[:, token] * log_scale.exp().squeeze(1) + shift.squeeze(1)
    return restore(x[:batch], block.config.order, grid)


@torch.no_grad()
def generate_as_published(
    model: Any, z: Tensor, cond: Any = None, null_cond: Any = None, guidance: Any = None, limit: float = math.inf
) -> Tensor:
    """Noise (B, C, H, W) to data, all blocks, the deep one first, in so many seconds at most; see `decode_as_published`."""
    tokens, grid = model.patchify(z)
    deadline = time.perf_counter() + limit
    for block in reversed(model.blocks):
        tokens = decode_as_published(block, tokens, grid, cond, null_cond, guidance, deadline)
    return model.unpatchify(tokens, grid)
