"""All layers of one token and few rows in one kernel, whose programs stay on the device from the first layer to the last.

Each program computes its share of every product. Between two products all wait for one another: each program adds one to a
number in memory when what it has written is there, and reads that number until all have come. While it waits, the weights
that it needs next are on their way already, so that memory hardly pauses; kernels that end and begin cannot do that.

The programs must all be on the device at once, which a cooperative launch makes sure of, or refuses. A program that has waited
for very long goes on with wrong numbers, which `fast_step.fastest` finds, and lets all others pass.

Only imported where there is Triton. Shapes: R rows, N columns, D width, H heads of queries and as many of keys, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tarflow.flows.decoding.fused import Way

#: How often a program reads the number of those that have come, at most; some 10 ms.
PATIENCE: tl.constexpr = tl.constexpr(20_000)
#: Places of a layer's weights in its row of the table, in this order.
PARTS = (
    *("qkv", "qkv_bias", "norm", "norm_bias", "query_norm", "key_norm", "proj", "proj_bias"),
    *("up", "up_bias", "mlp_norm", "mlp_norm_bias", "down", "down_bias"),
)
WORDS: tl.constexpr = tl.constexpr(len(PARTS))
#: Each begins at a multiple of so many numbers after the first, for loads of 16 bytes.
ALIGNED: tl.constexpr = tl.constexpr(8)
#: Slots of the cache that a program looks at together, at least.
SHORTEST_TURN = 16
#: 32-bit registers of a multiprocessor, and the most that a thread can have.
REGISTERS, MOST_REGISTERS = 65536, 255


@triton.jit
def arrive(arrivals_at):
    """Tell all programs that what this one has written is there."""
    tl.debug_barrier()
    tl.atomic_add(arrivals_at, 1, sem="release")


@triton.jit
def wait(arrivals_at, expected):
    """Until so many have told; what they have written can be read then."""
    arrived = tl.atomic_add(arrivals_at, 0, sem="acquire")
    tries = 0
    while (arrived < expected) & (tries < PATIENCE):
        arrived = tl.atomic_add(arrivals_at, 0, sem="acquire")
        tries += 1
    if tries == PATIENCE:  # in vain: let all pass from now on
        tl.atomic_add(arrivals_at, 1 << 29, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def part_at(base_at, words, number: tl.constexpr):
    """Where one of a layer's `PARTS` begins."""
    return base_at + tl.multiple_of(tl.load(words + number), ALIGNED)


@triton.jit
def weights_from(weight_at, first, columns, width: tl.constexpr, padded_width: tl.constexpr, block: tl.constexpr):
    """Rows of a weight (N, D) from ``first`` on, (block, padded D), zeros where there are none."""
    numbers, lanes = first + tl.arange(0, block), tl.arange(0, padded_width)
    place = weight_at + numbers.to(tl.int64)[:, None] * width + lanes[None, :]
    here = (numbers < columns)[:, None] & (lanes < width)[None, :]
    return tl.load(place, mask=here, other=0.0, eviction_policy="evict_first")


@triton.jit
def rows_of(x_at, rows: tl.constexpr, width: tl.constexpr, padded_width: tl.constexpr):
    """Each row of x (R, D), which other programs have written, (padded D) each."""
    lanes = tl.arange(0, padded_width)
    found = ()
    for row in tl.static_range(rows):
        place = x_at + row * width + lanes
        found = found + (tl.load(place, mask=lanes < width, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    return found


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def sums(xs, row: tl.constexpr, rows: tl.constexpr):
    """Of a row and of its squares, then of the row after it (again of this one if there is none), in one exchange among threads."""
    x = xs[row].to(tl.float32)
    if row + 1 < rows:
        y = xs[row + 1].to(tl.float32)
        return tl.reduce((x, x * x, y, y * y), 0, add_four)
    a, b = tl.reduce((x, x * x), 0, add_two)
    return a, b, a, b


@triton.jit
def scaled(x, total, squares, weight, bias, eps: tl.constexpr, width: tl.constexpr, norm: tl.constexpr):
    """A row after a norm, rounded as it was."""
    y = x.to(tl.float32)
    mean = total / width
    if norm == "layer":
        y = (y - mean) * tl.rsqrt(tl.maximum(squares / width - mean * mean, 0.0) + eps) * weight + bias
    else:
        y = y * tl.rsqrt(squares / width + eps) * (1 + weight)
    return y.to(x.dtype)


@triton.jit
def normed(xs, weight, bias, eps: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, norm: tl.constexpr):
    """Rows after a norm; weight and bias (padded D) in float32, zeros behind the width."""
    found = ()
    for row in tl.static_range(0, rows, 2):
        first, first_squares, second, second_squares = sums(xs, row, rows)
        found = found + (scaled(xs[row], first, first_squares, weight, bias, eps, width, norm),)  # noqa: RUF005
        if row + 1 < rows:
            found = found + (scaled(xs[row + 1], second, second_squares, weight, bias, eps, width, norm),)  # noqa: RUF005
    return found


@triton.jit
def norm_of(base_at, words, number: tl.constexpr, width: tl.constexpr, padded_width: tl.constexpr, norm: tl.constexpr):
    """A norm's weight and, of layer norms, bias, (padded D) in float32, zeros behind the width."""
    lanes = tl.arange(0, padded_width)
    weight = tl.load(part_at(base_at, words, number) + lanes, mask=lanes < width, other=0.0).to(tl.float32)
    bias = weight
    if norm == "layer":
        bias = tl.load(part_at(base_at, words, number + 1) + lanes, mask=lanes < width, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def product(
    weights,
    number: tl.constexpr,
    x_at,
    residual_at,
    out_at,
    base_at,
    words,
    arrivals_at,
    expected,
    program,
    programs,
    eps: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    block: tl.constexpr,
    norm: tl.constexpr,
    gelu: tl.constexpr,
):
    """Wait for x (R, D), compute a program's columns of act(norm(x)·Wᵀ + b) + residual, (R, N), and tell. ``weights`` are the
    first ones of the part ``number``, which are there or on their way; its bias is the part after it, and its norm's weight and
    bias the two after that."""
    kind = out_at.dtype.element_ty
    weight_at, bias_at = part_at(base_at, words, number), part_at(base_at, words, number + 1)
    if norm != "none":
        norm_weight, norm_bias = norm_of(base_at, words, number + 2, width, padded_width, norm)
    wait(arrivals_at, expected)
    xs = rows_of(x_at, rows, width, padded_width)
    if norm != "none":
        xs = normed(xs, norm_weight, norm_bias, eps, rows, width, norm)
    for first in range(program * block, columns, programs * block):
        current = weights
        weights = weights_from(weight_at, first + programs * block, columns, width, padded_width, block)
        tl.debug_barrier()  # before which they are asked for: the assembler would move them behind the sums
        numbers = first + tl.arange(0, block)
        exists = numbers < columns
        bias = tl.load(bias_at + numbers, mask=exists, other=0.0).to(tl.float32)
        for row in tl.static_range(rows):
            place = row * columns + numbers
            if residual_at is not None:
                added = tl.load(residual_at + place, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float32)
            y = tl.sum(current.to(tl.float32) * xs[row].to(tl.float32)[None, :], axis=1) + bias
            if gelu:
                y = y.to(kind).to(tl.float32)
                y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
            if residual_at is not None:
                y += added
            tl.store(out_at + place, y.to(kind), mask=exists)
    arrive(arrivals_at)


@triton.jit
def keys_and_values_from(cache, value_stride, first, end, turn: tl.constexpr, size: tl.constexpr):
    """Slots of one head's cache from ``first`` on, (turn, d) both, zeros from ``end`` on."""
    slots, lanes = first + tl.arange(0, turn), tl.arange(0, size)
    place = cache + slots[:, None] * size + lanes[None, :]
    seen = (slots < end)[:, None]
    return tl.load(place, mask=seen, other=0.0), tl.load(place + value_stride, mask=seen, other=0.0)


@triton.jit
def turned(
    x_at,
    norm_at,
    cos_at,
    sin_at,
    eps: tl.constexpr,
    size: tl.constexpr,
    rotated: tl.constexpr,
    normed: tl.constexpr,
):
    """One head's query or key (d,), normed and rotated, in float32 and rounded as x is where the operations one by one would."""
    lanes = tl.arange(0, size)
    kind = x_at.dtype.element_ty
    x = tl.load(x_at + lanes, cache_modifier=".cg").to(tl.float32)
    other = tl.load(x_at + (lanes ^ 1), cache_modifier=".cg").to(tl.float32)  # of each rotated pair
    if normed:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
        x = (x * scale * (1 + tl.load(norm_at + lanes).to(tl.float32))).to(kind).to(tl.float32)
        other = (other * scale * (1 + tl.load(norm_at + (lanes ^ 1)).to(tl.float32))).to(kind).to(tl.float32)
    if rotated:
        x = x * tl.load(cos_at + lanes).to(tl.float32) + other * tl.load(sin_at + lanes).to(tl.float32)
    return x.to(kind).to(tl.float32)


@triton.jit
def attention(
    keys,
    values,
    qkv_at,
    cache_at,
    position,
    query_norm_at,
    key_norm_at,
    cos_at,
    sin_at,
    temperature_at,
    sums_at,
    most_at,
    total_at,
    finished_at,
    out_at,
    layer,
    program,
    programs,
    row_stride,
    value_stride,
    head_stride,
    eps: tl.constexpr,
    scale: tl.constexpr,
    rows: tl.constexpr,
    heads: tl.constexpr,
    size: tl.constexpr,
    splits: tl.constexpr,
    padded_splits: tl.constexpr,
    turn: tl.constexpr,
    rotated: tl.constexpr,
    normed: tl.constexpr,
    tempered: tl.constexpr,
):
    """A program's share of the heads, each of which is divided by its cached slots; writes the new keys and values to the
    cache. The last program to finish a head joins its parts. ``keys`` and ``values`` are the first ones, which are there."""
    kind = out_at.dtype.element_ty
    lanes = tl.arange(0, size)
    length = (position + splits - 1) // splits
    for task in range(program, rows * heads * splits, programs):
        pair, split = task // splits, task % splits
        row, head = pair // heads, pair % heads
        product = qkv_at + row * 3 * heads * size + head * size
        cache = cache_at + row * row_stride + head * head_stride
        q = turned(product, query_norm_at, cos_at, sin_at, eps, size, rotated, normed)
        if tempered:
            q = (q * tl.load(temperature_at + row).to(tl.float32)).to(kind).to(tl.float32)
        q = q * scale
        begin = split * length
        end = tl.minimum(begin + length, position)
        most, total = -float("inf"), 0.0
        out = tl.zeros((size,), tl.float32)
        for first in range(begin, end, turn):
            these_keys, these_values = keys.to(tl.float32), values.to(tl.float32)
            keys, values = keys_and_values_from(cache, value_stride, first + turn, end, turn, size)
            logits = tl.sum(q[None, :] * these_keys, axis=1)
            logits = tl.where(first + tl.arange(0, turn) < end, logits, float("-inf"))
            higher = tl.maximum(most, tl.max(logits, axis=0))
            weights, fade = tl.exp(logits - higher), tl.exp(most - higher)
            total = total * fade + tl.sum(weights, axis=0)
            out = out * fade + tl.sum(weights[:, None] * these_values, axis=0)
            most = higher
        if split == splits - 1:  # has the new one too
            key = turned(product + heads * size, key_norm_at, cos_at, sin_at, eps, size, rotated, normed)
            value = tl.load(product + 2 * heads * size + lanes, cache_modifier=".cg")
            tl.store(cache + position * size + lanes, key.to(kind))
            tl.store(cache + position * size + lanes + value_stride, value)
            logit = tl.sum(q * key, axis=0)
            higher = tl.maximum(most, logit)
            weight, fade = tl.exp(logit - higher), tl.exp(most - higher)
            total = total * fade + weight
            out = out * fade + weight * value.to(tl.float32)
            most = higher
        tl.store(most_at + task, most)
        tl.store(total_at + task, total)
        tl.store(sums_at + task * size + lanes, out)
        tl.debug_barrier()
        before = tl.atomic_add(finished_at + pair, 1, sem="acq_rel")
        if before == (layer + 1) * splits - 1:
            numbers = tl.arange(0, padded_splits)
            place, exists = pair * splits + numbers, numbers < splits
            parts_most = tl.load(most_at + place, mask=exists, other=float("-inf"), cache_modifier=".cg")
            parts_total = tl.load(total_at + place, mask=exists, other=0.0, cache_modifier=".cg")
            places = sums_at + place[:, None] * size + lanes[None, :]
            parts = tl.load(places, mask=exists[:, None], other=0.0, cache_modifier=".cg")
            fades = tl.exp(parts_most - tl.max(parts_most, axis=0))
            joined = tl.sum(fades[:, None] * parts, axis=0) / tl.sum(fades * parts_total, axis=0)
            tl.store(out_at + pair * size + lanes, joined.to(kind))
        if task + programs < rows * heads * splits:
            further = task + programs
            pair, begin = further // splits, (further % splits) * length
            cache = cache_at + (pair // heads) * row_stride + (pair % heads) * head_stride
            end = tl.minimum(begin + length, position)
            keys, values = keys_and_values_from(cache, value_stride, begin, end, turn, size)


@triton.jit
def all_layers(
    hidden_at,
    middle_at,
    base_at,
    table_at,
    cache_at,
    position_at,
    cos_at,
    sin_at,
    temperature_at,
    qkv_at,
    sums_at,
    most_at,
    total_at,
    attended_at,
    up_at,
    arrivals_at,
    finished_at,
    layer_stride,
    row_stride,
    value_stride,
    head_stride,
    table_stride,
    layers,
    eps: tl.constexpr,
    head_eps: tl.constexpr,
    scale: tl.constexpr,
    programs: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    block: tl.constexpr,
    inner: tl.constexpr,
    padded_inner: tl.constexpr,
    inner_block: tl.constexpr,
    heads: tl.constexpr,
    size: tl.constexpr,
    splits: tl.constexpr,
    padded_splits: tl.constexpr,
    turn: tl.constexpr,
    norm: tl.constexpr,
    rotated: tl.constexpr,
    qk_normed: tl.constexpr,
    tempered: tl.constexpr,
):
    """hidden (R, D) → hidden after all layers, in place. D = H·d. ``table`` (layers, `PARTS`) says how many numbers after
    ``base`` each weight begins."""
    program = tl.program_id(0)
    position = tl.load(position_at).to(tl.int32)
    cos, sin = cos_at, sin_at
    if rotated:
        cos, sin = cos_at + position * table_stride, sin_at + position * table_stride
    # Of the first task of attention, whose cached keys are loaded before it.
    pair, length = program // splits, (position + splits - 1) // splits
    begin = (program % splits) * length
    end = tl.minimum(begin + length, position)
    if program >= rows * heads * splits:
        end = begin
    first_head = (pair // heads) * row_stride + (pair % heads) * head_stride
    expected = 0
    words, cache = table_at, cache_at
    qkv_weights = weights_from(part_at(base_at, words, 0), program * block, 3 * width, width, padded_width, block)
    for layer in range(layers):
        product(
            qkv_weights,
            0,
            hidden_at,
            None,
            qkv_at,
            base_at,
            words,
            arrivals_at,
            expected,
            program,
            programs,
            eps,
            rows,
            3 * width,
            width,
            padded_width,
            block,
            norm,
            False,
        )
        expected += programs
        keys, values = keys_and_values_from(cache + first_head, value_stride, begin, end, turn, size)
        proj_weights = weights_from(part_at(base_at, words, 6), program * block, width, width, padded_width, block)
        wait(arrivals_at, expected)
        attention(
            keys,
            values,
            qkv_at,
            cache,
            position,
            part_at(base_at, words, 4),
            part_at(base_at, words, 5),
            cos,
            sin,
            temperature_at,
            sums_at,
            most_at,
            total_at,
            finished_at,
            attended_at,
            layer,
            program,
            programs,
            row_stride,
            value_stride,
            head_stride,
            head_eps,
            scale,
            rows,
            heads,
            size,
            splits,
            padded_splits,
            turn,
            rotated,
            qk_normed,
            tempered,
        )
        arrive(arrivals_at)
        expected += programs
        product(
            proj_weights,
            6,
            attended_at,
            hidden_at,
            middle_at,
            base_at,
            words,
            arrivals_at,
            expected,
            program,
            programs,
            eps,
            rows,
            width,
            width,
            padded_width,
            block,
            "none",
            False,
        )
        expected += programs
        up_weights = weights_from(part_at(base_at, words, 8), program * block, inner, width, padded_width, block)
        product(
            up_weights,
            8,
            middle_at,
            None,
            up_at,
            base_at,
            words,
            arrivals_at,
            expected,
            program,
            programs,
            eps,
            rows,
            inner,
            width,
            padded_width,
            block,
            norm,
            True,
        )
        expected += programs
        down_at = part_at(base_at, words, 12)
        down_weights = weights_from(down_at, program * inner_block, width, inner, padded_inner, inner_block)
        product(
            down_weights,
            12,
            up_at,
            middle_at,
            hidden_at,
            base_at,
            words,
            arrivals_at,
            expected,
            program,
            programs,
            eps,
            rows,
            width,
            inner,
            padded_inner,
            inner_block,
            "none",
            False,
        )
        expected += programs
        columns = tl.where(layer + 1 < layers, 3 * width, 0)  # behind the last layer there is nothing to load
        words += tl.where(layer + 1 < layers, WORDS, 0)
        cache += layer_stride
        qkv_weights = weights_from(part_at(base_at, words, 0), program * block, columns, width, padded_width, block)


def launch_options(way: Way) -> dict[str, Any]:
    """Of programs that are all on the device at once: as few registers as leaves room for all."""
    share = REGISTERS // (32 * way.warps * way.resident)
    return {"launch_cooperative_grid": True, "maxnreg": min(MOST_REGISTERS, share // 8 * 8)}


def launched(layers: Any, hidden: Tensor, position: Tensor) -> None:
    """`all_layers` of a `ResidentLayers`; hidden (R, D) is written to."""
    step, way, cache = layers.step, layers.way, layers.step.cache.keys_values
    rows, width = hidden.shape
    padded_width, padded_inner = triton.next_power_of_2(width), triton.next_power_of_2(layers.inner)
    rotated, normed = step.cos is not None, layers.query_norm is not None
    all_layers[(layers.programs,)](
        hidden,
        layers.middle,
        layers.base,
        layers.table,
        cache,
        position,
        step.cos,
        step.sin,
        step.inverse_temperature,
        layers.qkv,
        layers.sums,
        layers.most,
        layers.total,
        layers.attended,
        layers.up,
        layers.counts,
        layers.counts[-rows * step.heads :],
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        cache.stride(3),
        step.cos.stride(0) if rotated else 0,
        len(layers.weights),
        eps=layers.norm.eps,
        head_eps=layers.query_norm.eps if normed else 0.0,
        scale=1 / math.sqrt(step.head_dim),
        programs=layers.programs,
        rows=rows,
        width=width,
        padded_width=padded_width,
        block=max(1, way.elements // padded_width),
        inner=layers.inner,
        padded_inner=padded_inner,
        inner_block=max(1, way.elements // padded_inner),
        heads=step.heads,
        size=step.head_dim,
        splits=layers.splits,
        padded_splits=triton.next_power_of_2(layers.splits),
        turn=max(SHORTEST_TURN, way.elements // (2 * step.head_dim)),  # keys and values take as much as a weight
        norm="layer" if hasattr(layers.norm, "bias") else "rms",
        rotated=rotated,
        qk_normed=normed,
        tempered=step.inverse_temperature is not None,
        num_warps=way.warps,
        **(launch_options(way) if layers.cooperative else {}),
    )
