"""A Transformer layer of one token and few rows in six kernels, where its operations would be seventeen or more: norm and
product in one, the activation or the residual sum with it; queries and keys normed, rotated and written with attention.

Such a step reads each weight once and does little else. Each kernel has some microseconds in which it begins and ends, and
memory waits; so few kernels, whose programs hold enough loads in flight, come nearer to the memory's speed. From compute
capability 9.0 on a kernel may also start early (`Way.early`), while the one before still runs. It loads what no kernel of
the chain writes: weights, the position, and slots before it. All else comes after its wait, which ends when the kernel
before is complete; as every program waits, the one before that is complete then too. Kernels that start normally stand at
both ends of the chain.

Only imported where there is Triton. Shapes: R rows, N columns, D width, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow.flows.decoding.fused import Way
from tarflow.flows.decoding.triton_attention import TURN, join_parts, room_for_parts, with_more_keys

#: Of programmatic dependent launch; None in a Triton without it, where no way is early.
LAUNCH_NEXT: Any = getattr(tl.extra.cuda, "gdc_launch_dependents", None)
WAIT: Any = getattr(tl.extra.cuda, "gdc_wait", None)


def starts_early(device: torch.device) -> bool:
    """Whether kernels on this CUDA device can start before the ones before them end."""
    return WAIT is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def normed_product(
    x_at,
    weight_at,
    bias_at,
    norm_weight_at,
    norm_bias_at,
    residual_at,
    out_at,
    eps: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
    norm: tl.constexpr,
    activation: tl.constexpr,
    residual: tl.constexpr,
    weights_stay: tl.constexpr,
    others_stay: tl.constexpr,
    early: tl.constexpr,
):
    """act(norm(x)·Wᵀ + b) + residual of some columns: x (R, D), W (N, D), both row after row; rounded where the operations
    one by one would round. Norm: "none", "layer", or "rms", whose weight w acts as 1 + w. Activation: "none", "gelu", or
    "geglu", whose W has the gates' rows first and then as many others."""
    if early:
        LAUNCH_NEXT()
    numbers = tl.program_id(0) * block + tl.arange(0, block)
    lanes = tl.arange(0, padded_width)
    exists, inside = numbers < columns, lanes < width
    here = exists[:, None] & inside[None, :]
    # Loads first: all that comes before they are used happens while they are on their way.
    place = numbers.to(tl.int64)[:, None] * width + lanes[None, :]
    weight = tl.load(weight_at + place, mask=here, other=0.0, eviction_policy=weights_stay)
    bias = tl.load(bias_at + numbers, mask=exists, other=0.0).to(tl.float32)
    if activation == "geglu":
        further_place = weight_at + columns * width + place
        further = tl.load(further_place, mask=here, other=0.0, eviction_policy=weights_stay)
        further_bias = tl.load(bias_at + columns + numbers, mask=exists, other=0.0).to(tl.float32)
    if norm != "none":
        norm_weight = tl.load(norm_weight_at + lanes, mask=inside, other=0.0).to(tl.float32)
    if norm == "layer":
        norm_bias = tl.load(norm_bias_at + lanes, mask=inside, other=0.0).to(tl.float32)
    kind = out_at.dtype.element_ty
    if early:
        WAIT()
    next_x = tl.load(x_at + lanes, mask=inside, other=0.0, eviction_policy=others_stay)
    if residual:
        next_added = tl.load(residual_at + numbers, mask=exists, other=0.0, eviction_policy=others_stay)
    for row in tl.static_range(rows):
        x = next_x.to(tl.float32)
        if residual:
            added = next_added.to(tl.float32)
        if row + 1 < rows:  # on its way while this row is computed
            x_place = x_at + (row + 1) * width + lanes
            next_x = tl.load(x_place, mask=inside, other=0.0, eviction_policy=others_stay)
            if residual:
                added_place = residual_at + (row + 1) * columns + numbers
                next_added = tl.load(added_place, mask=exists, other=0.0, eviction_policy=others_stay)
        if norm == "layer":
            x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
            x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * norm_weight + norm_bias
            x = x.to(kind).to(tl.float32)
        if norm == "rms":
            x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * (1 + norm_weight)
            x = x.to(kind).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1) + bias
        if activation == "gelu":
            y = y.to(kind).to(tl.float32)
            y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
        if activation == "geglu":
            gate = y.to(kind).to(tl.float32)
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            gate = gate * tl.sigmoid(2 * inner)  # ½(1 + tanh(a)) = sigmoid(2a)
            y = (tl.sum(further.to(tl.float32) * x[None, :], axis=1) + further_bias).to(kind).to(tl.float32)
            y = gate.to(kind).to(tl.float32) * y
        target = row * columns + numbers
        if residual:
            y += added
        tl.store(out_at + target, y.to(kind), mask=exists)


@triton.jit
def attend_with_new(
    qkv_at,
    cache_at,
    position_at,
    cos_at,
    sin_at,
    query_norm_at,
    key_norm_at,
    temperature_at,
    out_at,
    most_at,
    total_at,
    row_stride,
    value_stride,
    head_stride,
    table_stride,
    eps: tl.constexpr,
    scale: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    parts: tl.constexpr,
    size: tl.constexpr,
    part_size: tl.constexpr,
    turn: tl.constexpr,
    rotated: tl.constexpr,
    normed: tl.constexpr,
    tempered: tl.constexpr,
    early: tl.constexpr,
):
    """As `triton_attention.attend_to_part`, from the product that makes queries, keys and values, (R, (H + 2K)·d): they are
    normed and rotated here, and the program whose part has the position writes the new key and value to the cache."""
    if early:
        LAUNCH_NEXT()
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, head = pair // kv_heads, pair % kv_heads
    position = tl.load(position_at)
    begin = part * part_size
    end = tl.minimum(begin + part_size, position)  # the new one comes from the product
    lanes = tl.arange(0, size)
    pairs = lanes ^ 1  # the other one of each rotated pair
    queries = tl.arange(0, padded_group)
    exists = queries < group
    kind = cache_at.dtype.element_ty
    # Slots before the position were written by earlier tokens.
    cache = cache_at + row * row_stride + head * head_stride
    slots = begin + tl.arange(0, turn)
    place = cache + slots[:, None] * size + lanes[None, :]
    next_keys = tl.load(place, mask=(slots < end)[:, None], other=0.0)
    next_values = tl.load(place + value_stride, mask=(slots < end)[:, None], other=0.0)
    if early:
        WAIT()
    heads: tl.constexpr = kv_heads * group
    product = qkv_at + row * (heads + 2 * kv_heads) * size
    q_place = product + (head * group + queries[:, None]) * size
    q = tl.load(q_place + lanes[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    k_place = product + (heads + head) * size
    key = tl.load(k_place + lanes).to(tl.float32)
    value = tl.load(product + (heads + kv_heads + head) * size + lanes)
    if rotated:
        q_other = tl.load(q_place + pairs[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
        key_other = tl.load(k_place + pairs).to(tl.float32)
    if normed:
        q_size = tl.rsqrt(tl.sum(q * q, axis=1) / size + eps)
        k_size = tl.rsqrt(tl.sum(key * key, axis=0) / size + eps)
        q_weight = 1 + tl.load(query_norm_at + lanes).to(tl.float32)
        k_weight = 1 + tl.load(key_norm_at + lanes).to(tl.float32)
        q = (q * q_size[:, None] * q_weight[None, :]).to(kind).to(tl.float32)
        key = (key * k_size * k_weight).to(kind).to(tl.float32)
        if rotated:
            q_weight = 1 + tl.load(query_norm_at + pairs).to(tl.float32)
            k_weight = 1 + tl.load(key_norm_at + pairs).to(tl.float32)
            q_other = (q_other * q_size[:, None] * q_weight[None, :]).to(kind).to(tl.float32)
            key_other = (key_other * k_size * k_weight).to(kind).to(tl.float32)
    if rotated:
        cos = tl.load(cos_at + position * table_stride + lanes).to(tl.float32)
        sin = tl.load(sin_at + position * table_stride + lanes).to(tl.float32)
        q = q * cos[None, :] + q_other * sin[None, :]
        key = key * cos + key_other * sin
    q = q.to(kind).to(tl.float32)
    if tempered:
        q = (q * tl.load(temperature_at + row).to(tl.float32)).to(kind).to(tl.float32)
    q = q * scale
    most = tl.full((padded_group,), float("-inf"), tl.float32)
    total = tl.zeros((padded_group,), tl.float32)
    out = tl.zeros((padded_group, size), tl.float32)
    for first in range(begin, end, turn):  # none if the part lies behind the position
        keys, values = next_keys.to(tl.float32), next_values.to(tl.float32)
        seen = first + tl.arange(0, turn) < end
        if part_size > turn:
            further = first + turn + tl.arange(0, turn)
            further_place = cache + further[:, None] * size + lanes[None, :]
            next_keys = tl.load(further_place, mask=(further < end)[:, None], other=0.0)
            next_values = tl.load(further_place + value_stride, mask=(further < end)[:, None], other=0.0)
        most, total, out = with_more_keys(q, keys, values, seen, most, total, out)
    if (position >= begin) & (position < begin + part_size):
        stored = key.to(kind)
        tl.store(cache + position * size + lanes, stored)
        tl.store(cache + position * size + lanes + value_stride, value)
        logits_of_new = tl.sum(q * stored.to(tl.float32)[None, :], axis=1)
        largest = tl.maximum(most, logits_of_new)
        weight_of_new = tl.exp(logits_of_new - largest)
        fading = tl.exp(most - largest)
        total = total * fading + weight_of_new
        out = out * fading[:, None] + weight_of_new[:, None] * value.to(tl.float32)[None, :]
        most = largest
    target = (pair * parts + part) * group + queries
    tl.store(most_at + target, most, mask=exists)
    tl.store(total_at + target, total, mask=exists)
    tl.store(out_at + target[:, None] * size + lanes[None, :], out, mask=exists[:, None])


@triton.jit
def join_after_wait(
    parts_at,
    most_at,
    total_at,
    out_at,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
    size: tl.constexpr,
    early: tl.constexpr,
):
    """`triton_attention.join_parts`, which may start early."""
    if early:
        LAUNCH_NEXT()
        WAIT()
    join_parts(parts_at, most_at, total_at, out_at, kv_heads, group, parts, padded_parts, size)


def launch_options(way: Way) -> dict[str, Any]:
    """Of each kernel: only an early one has the option, which interpreters and other backends do not know."""
    return {"early": True, "launch_pdl": True} if way.early else {"early": False}


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    way: Way,
    norm: tuple[str, Tensor | None, Tensor | None, float] = ("none", None, None, 0.0),
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`normed_product` of all columns, (R, N).

    Args:
        x: (R, D), contiguous.
        weight, bias: (N, D) and (N,), contiguous; for "geglu" 2N.
        way: says how many elements of the weight one program holds; each holds all of a column.
        norm: its kind, weight, bias and eps.
        residual: (R, N), added at the end.
    """
    rows, width = x.shape
    columns = weight.shape[0] // (2 if activation == "geglu" else 1)
    padded = triton.next_power_of_2(width)
    block = max(1, way.elements // padded // (2 if activation == "geglu" else 1))
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    kind, norm_weight, norm_bias, eps = norm
    normed_product[(triton.cdiv(columns, block),)](
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        residual,
        out,
        eps=eps,
        rows=rows,
        width=width,
        padded_width=padded,
        columns=columns,
        block=block,
        norm=kind,
        activation=activation,
        residual=residual is not None,
        weights_stay="evict_first" if way.hints else "",
        others_stay="evict_last" if way.hints else "",
        num_warps=way.warps,
        **launch_options(way),
    )
    return out


def attention(
    qkv: Tensor,
    keys_values: Tensor,
    position: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
    inverse_temperature: Tensor | None,
    way: Way,
    eps: float = 1e-6,
) -> Tensor:
    """`attend_with_new` and the joining of its parts, (R, H·d); writes the slot's key and value to the cache.

    Args:
        qkv: queries, keys and values of all heads, (R, (H + 2K)·d), contiguous.
        keys_values: of one layer, (R, 2, K, capacity, d).
        position: of the new token in the cache, an int64 scalar on the device.
        rotation: tables (S, at least d), row by row.
        norms: weights (d,) of the norms of queries and keys.
        inverse_temperature: (R, 1).
        way: says how many slots one program looks at.
        eps: of these norms.
    """
    rows, _, kv_heads, capacity, size = keys_values.shape
    heads = qkv.shape[1] // size - 2 * kv_heads
    group, parts = heads // kv_heads, triton.cdiv(capacity, way.part)
    partial, most, total = room_for_parts(rows * kv_heads, parts, group, size, qkv.device)
    out = torch.empty(rows, heads * size, dtype=qkv.dtype, device=qkv.device)
    cos, sin = (None, None) if rotation is None else rotation
    query_norm, key_norm = (None, None) if norms is None else norms
    attend_with_new[(rows * kv_heads, parts)](
        qkv,
        keys_values,
        position,
        cos,
        sin,
        query_norm,
        key_norm,
        inverse_temperature,
        partial,
        most,
        total,
        keys_values.stride(0),
        keys_values.stride(1),
        keys_values.stride(2),
        0 if cos is None else cos.stride(0),
        eps=eps,
        scale=1 / math.sqrt(size),
        kv_heads=kv_heads,
        group=group,
        padded_group=triton.next_power_of_2(group),
        parts=parts,
        size=size,
        part_size=way.part,
        turn=TURN,
        rotated=cos is not None,
        normed=norms is not None,
        tempered=inverse_temperature is not None,
        **launch_options(way),
    )
    join_after_wait[(rows * kv_heads, group)](
        partial,
        most,
        total,
        out,
        kv_heads=kv_heads,
        group=group,
        parts=parts,
        padded_parts=triton.next_power_of_2(parts),
        size=size,
        **launch_options(way),
    )
    return out
