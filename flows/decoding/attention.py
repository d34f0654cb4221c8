"""Attention of one new token to a cache of fixed size, of which the slots up to a position hold something.

On CUDA devices a kernel reads only these slots (`triton_attention`); elsewhere, and where Triton is not there or the shape
does not suit it, all slots are read behind a mask. The position lies on the device in both, so that one compiled step, or
one CUDA graph, serves all tokens. How the kernel divides these slots is chosen among `ATTENTION_WAYS` on the device.

Shapes: R rows, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: What the kernel takes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128, 256)


class AttentionWay(NamedTuple):
    """How the kernel divides the keys of a head.

    Attributes:
        name: in reports, of steps whose layers are computed one by one.
        elements: of keys that one program loads at once, and as many of values; 0: 128 slots in two turns.
        warps: of a program.
    """

    name: str
    elements: int = 0
    warps: int = 4


#: To choose from; the first one is taken where nothing is tried. Each takes about a second to compile.
ATTENTION_WAYS = (
    AttentionWay("one by one"),
    AttentionWay("one by one, keys of 8192 elements at once", 8192),
    AttentionWay("one by one, keys of 4096 elements at once", 4096),
    AttentionWay("one by one, keys of 4096 elements at once, 2 warps", 4096, warps=2),
)


def masked_attention(q: Tensor, keys_values: Tensor, position: Tensor) -> Tensor:
    """One token's attention, heads side by side, (R, H·d).

    Args:
        q: queries (R, H·d), side by side; H is a multiple of K, and the heads of a group follow one another.
        keys_values: of one layer, (R, 2, K, capacity, d); the new token's are written already. All must be finite.
        position: of the new token in the cache, an int64 scalar on the device.
    """
    rows, _, kv_heads, capacity, head_dim = keys_values.shape
    seen = (torch.arange(capacity, device=q.device) <= position).view(1, 1, 1, -1)
    keys, values = keys_values.unbind(1)
    q = q.view(rows, kv_heads, -1, head_dim)  # the heads of a group are queries of one key/value head
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=1 / math.sqrt(head_dim))
    return y.reshape(rows, -1)


def attention_ways(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[AttentionWay, ...]:
    """Of the kernel, for a device and kind of numbers; none where it is not taken."""
    suits = device.type == "cuda" and torch.version.hip is None and dtype in DTYPES and head_dim in HEAD_SIZES
    return ATTENTION_WAYS if suits and importlib.util.find_spec("triton") is not None else ()


def cached_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, way: AttentionWay = ATTENTION_WAYS[0]
) -> Callable[..., Tensor]:
    """The function for a device and kind of numbers; arguments as of `masked_attention`."""
    if not attention_ways(device, dtype, head_dim):
        return masked_attention
    from tarflow.flows.decoding.triton_attention import decode_attention

    return partial(decode_attention, elements=way.elements, warps=way.warps)
