"""The kernels of `cached_attention`: each head's keys are divided among several programs, so that a small batch fills a GPU,
and programs behind the position end at once. A second, short kernel joins the parts.

There are two kernels for the parts. `attend_to_part` goes through its keys in turns and computes all queries of a group
together, with three axes; for that, each turn's keys pass through shared memory, since threads load 16 bytes in a row but
such sums want neighbouring numbers in neighbouring threads. `attend_to_tile` asks for all its keys and values at once, keeps
them where they were loaded, and computes one query after the other.

Only imported where there is Triton. Shapes as there; G query heads share a key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

#: Keys of a program, and those that it looks at together.
PART, TURN = 128, 64


@triton.jit
def with_more_keys(q, keys, values, seen, most, total, out):
    """What `attend_to_part` gives, (G,), (G,) and (G, d), after a turn of further keys and values (turn, d), all float32;
    keys that are not seen count for nothing."""
    logits = tl.sum(q[:, None, :] * keys[None, :, :], axis=2)  # (G, turn)
    logits = tl.where(seen[None, :], logits, float("-inf"))
    higher = tl.maximum(most, tl.max(logits, axis=1))
    weights = tl.exp(logits - higher[:, None])
    fade = tl.exp(most - higher)
    total = total * fade + tl.sum(weights, axis=1)
    out = out * fade[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], axis=1)
    return higher, total, out


@triton.jit
def attend_to_part(
    q_at,
    cache_at,
    position_at,
    out_at,
    most_at,
    total_at,
    q_stride,
    row_stride,
    value_stride,
    head_stride,
    scale: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    parts: tl.constexpr,
    size: tl.constexpr,
    part_size: tl.constexpr,
    turn: tl.constexpr,
):
    """Of one key/value head of one row and one part of the keys: the largest logit of each of the G queries, the sum of
    the weights exp(logit − largest), and the weighted sum of the values, all float32."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, head = pair // kv_heads, pair % kv_heads
    filled = tl.load(position_at) + 1
    begin = part * part_size
    end = tl.minimum(begin + part_size, filled)
    lanes = tl.arange(0, size)
    queries = tl.arange(0, padded_group)
    exists = queries < group
    q_place = q_at + row * q_stride + (head * group + queries[:, None]) * size + lanes[None, :]
    q = tl.load(q_place, mask=exists[:, None], other=0.0).to(tl.float32) * scale
    most = tl.full((padded_group,), float("-inf"), tl.float32)
    total = tl.zeros((padded_group,), tl.float32)
    out = tl.zeros((padded_group, size), tl.float32)
    cache = cache_at + row * row_stride + head * head_stride
    for first in range(begin, end, turn):  # none if the part lies behind the position
        slots = first + tl.arange(0, turn)
        seen = slots < end
        place = cache + slots[:, None] * size + lanes[None, :]
        keys = tl.load(place, mask=seen[:, None], other=0.0).to(tl.float32)
        values = tl.load(place + value_stride, mask=seen[:, None], other=0.0).to(tl.float32)
        most, total, out = with_more_keys(q, keys, values, seen, most, total, out)
    place = (pair * parts + part) * group + queries
    tl.store(most_at + place, most, mask=exists)
    tl.store(total_at + place, total, mask=exists)
    tl.store(out_at + place[:, None] * size + lanes[None, :], out, mask=exists[:, None])


@triton.jit
def attend_to_tile(
    q_at,
    cache_at,
    position_at,
    out_at,
    most_at,
    total_at,
    q_stride,
    row_stride,
    value_stride,
    head_stride,
    scale: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    parts: tl.constexpr,
    size: tl.constexpr,
    part_size: tl.constexpr,
):
    """The same results as of `attend_to_part`, without turns; `part_size` is a power of two."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, head = pair // kv_heads, pair % kv_heads
    filled = tl.load(position_at).to(tl.int32) + 1
    lanes = tl.arange(0, size)
    target = (pair * parts + part) * group
    if part * part_size < filled:
        slots = part * part_size + tl.arange(0, part_size)
        seen = slots < filled
        place = cache_at + row * row_stride + head * head_stride + slots[:, None] * size + lanes[None, :]
        keys = tl.load(place, mask=seen[:, None], other=0.0)
        values = tl.load(place + value_stride, mask=seen[:, None], other=0.0)
        for query in tl.static_range(group):
            q = tl.load(q_at + row * q_stride + (head * group + query) * size + lanes).to(tl.float32) * scale
            logits = tl.where(seen, tl.sum(q[None, :] * keys.to(tl.float32), axis=1), float("-inf"))
            most = tl.max(logits, axis=0)  # the first slot is seen
            weights = tl.exp(logits - most)
            tl.store(most_at + target + query, most)
            tl.store(total_at + target + query, tl.sum(weights, axis=0))
            out = tl.sum(weights[:, None] * values.to(tl.float32), axis=0)
            tl.store(out_at + (target + query) * size + lanes, out)
    else:
        for query in tl.static_range(group):
            tl.store(most_at + target + query, float("-inf"))
            tl.store(total_at + target + query, 0.0)
            tl.store(out_at + (target + query) * size + lanes, tl.zeros((size,), tl.float32))


@triton.jit
def join_parts(
    parts_at,
    most_at,
    total_at,
    out_at,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
    size: tl.constexpr,
):
    """The softmax over all parts, of one query head of one row. The first part is never empty."""
    pair, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers, lanes = tl.arange(0, padded_parts), tl.arange(0, size)
    exists = numbers < parts
    place = (pair * parts + numbers) * group + query
    most = tl.load(most_at + place, mask=exists, other=float("-inf"))
    weights = tl.exp(most - tl.max(most, axis=0))  # 0 for parts without a key
    total = tl.sum(weights * tl.load(total_at + place, mask=exists, other=0.0), axis=0)
    values = tl.load(parts_at + place[:, None] * size + lanes[None, :], mask=exists[:, None], other=0.0)
    out = tl.sum(weights[:, None] * values, axis=0) / total
    row, head = pair // kv_heads, pair % kv_heads
    place = ((row * kv_heads + head) * group + query) * size + lanes
    tl.store(out_at + place, out.to(out_at.dtype.element_ty))


def room_for_parts(
    pairs: int, parts: int, group: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For what the programs of all parts give: weighted sums (pairs, parts, G, d), largest logits and sums of weights."""
    sums = torch.empty(pairs, parts, group, size, dtype=torch.float32, device=device)
    most, total = (torch.empty(sums.shape[:3], dtype=torch.float32, device=device) for _ in range(2))
    return sums, most, total


def launched(
    q: Tensor,
    keys_values: Tensor,
    position: Tensor,
    wrap: Callable[[Any], Any],
    elements: int = 0,
    warps: int = 4,
) -> Tensor:
    """Both kernels, one after the other; ``wrap`` makes of each what is called with a grid. The last two are an
    `AttentionWay`'s."""
    rows, _, kv_heads, capacity, size = keys_values.shape
    part = elements // size if elements else PART
    group, parts = q.shape[1] // (kv_heads * size), triton.cdiv(capacity, part)
    partial, most, total = room_for_parts(rows * kv_heads, parts, group, size, q.device)
    out = torch.empty(rows, q.shape[1], dtype=q.dtype, device=q.device)
    turns = {"padded_group": triton.next_power_of_2(group), "turn": TURN}
    wrap(attend_to_tile if elements else attend_to_part)[(rows * kv_heads, parts)](
        q,
        keys_values,
        position,
        partial,
        most,
        total,
        q.stride(0),
        keys_values.stride(0),
        keys_values.stride(1),
        keys_values.stride(2),
        scale=1 / math.sqrt(size),  # a constant: an argument would be 64 bits wide in compiled steps
        kv_heads=kv_heads,
        group=group,
        parts=parts,
        size=size,
        part_size=part,
        **({"num_warps": warps} if elements else turns),
    )
    wrap(join_parts)[(rows * kv_heads, group)](
        partial,
        most,
        total,
        out,
        kv_heads=kv_heads,
        group=group,
        parts=parts,
        padded_parts=triton.next_power_of_2(parts),
        size=size,
    )
    return out


@triton_op("tarflow::decode_attention", mutates_args={})
def decode_attention(q: Tensor, keys_values: Tensor, position: Tensor, elements: int = 0, warps: int = 4) -> Tensor:
    """As of `masked_attention`; slots behind the position are not read. The last two are an `AttentionWay`'s."""
    return launched(q, keys_values, position, wrap_triton, elements, warps)
