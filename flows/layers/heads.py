"""Queries, keys and values of all heads from their one product: norms and rotary positions, and their gradients.

As separate operations, these take a third of a small model's step of training on a CPU, and half of its memory traffic on
a GPU: each reads and writes all numbers in float32. `turned_heads` does the same in few passes, on a CPU in pieces that stay in
its caches, and keeps nothing for the backward pass but, with norms, the product itself and a number for each head.

Shapes: B batch, S slots, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.layers.positions import Rotation, rotate, turns_of

#: Numbers of a piece on a CPU: some megabytes with all that is computed of them.
PIECE = 2**20
#: Where there are complex numbers for sure, as which pairs are rotated.
COMPLEX_DEVICES = ("cpu", "cuda")

Heads = tuple[Tensor, Tensor, Tensor]
Norm = Callable[[Tensor], Tensor]


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x·rsqrt(mean(x²) + eps)·(1 + weight) of the last axis, in at least float32, rounded to x's dtype."""
    y = at_least_float32(x)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1 + weight.to(y.dtype))).to(x.dtype)


def turned_heads(
    qkv: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor, float] | None, rotation: Rotation | None
) -> Heads:
    """Queries (B, H, S, d), keys and values (B, K, S, d).

    Args:
        qkv: all heads, queries first, then keys, then values, (B, S, H + 2K, d).
        norms: weights (d,) of the norms of queries and keys, and their eps; None for none.
        rotation: tables of the S slots, see `rotation_tables`; None for none.
    """
    if norms is None and rotation is None:
        return by_operations(qkv, heads, kv_heads, None, None)
    query_weight, key_weight, eps = norms or (None, None, 0.0)
    if qkv.device.type not in COMPLEX_DEVICES or is_transformed(qkv):
        return by_operations(qkv, heads, kv_heads, norm_functions(query_weight, key_weight, eps), rotation)
    cos, sin = rotation or (None, None)
    found: Heads = TurnedHeads.apply(qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps)
    return found


def is_transformed(x: Tensor) -> bool:
    """Whether compilers, `torch.func` or forward-mode derivatives want to see single operations."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def norm_functions(query_weight: Tensor | None, key_weight: Tensor | None, eps: float) -> tuple[Norm, Norm] | None:
    """The norms of queries and of keys, None without weights."""
    if query_weight is None or key_weight is None:
        return None
    return partial(rms_normed, weight=query_weight, eps=eps), partial(rms_normed, weight=key_weight, eps=eps)


def by_operations(
    qkv: Tensor, heads: int, kv_heads: int, norms: tuple[Norm, Norm] | None, rotation: Rotation | None
) -> Heads:
    """As `turned_heads`, one operation after the other; norms are functions of queries and of keys."""
    q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query_norm, key_norm = norms
        q, k = query_norm(q), key_norm(k)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return q, k, v


class TurnedHeads(torch.autograd.Function):
    """`by_operations` with a backward pass of its own; the norm's result is not rounded before it is rotated."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> Heads:
        batch, slots, _, size = qkv.shape
        both, dtype = heads + kv_heads, at_least_float32(qkv[:0]).dtype
        scales = qkv.new_empty(batch, slots, both, 1, dtype=dtype)
        q, k = qkv.new_empty(batch, heads, slots, size), qkv.new_empty(batch, kv_heads, slots, size)
        v = qkv[:, :, both:].transpose(1, 2).contiguous()
        weights = None
        if query_weight is not None and key_weight is not None:
            weights = norm_weights(query_weight, key_weight, heads, kv_heads, dtype)
        turns = None if cos is None or sin is None else turns_of(cos.to(dtype), sin.to(dtype)).unsqueeze(-2)
        for piece, (y,) in pieces(qkv, both, dtype, 1):
            y.copy_(qkv[piece, :, :both])
            if weights is not None:
                scale = scales[piece]
                torch.linalg.vector_norm(y, dim=-1, keepdim=True, out=scale)
                scale.square_().mul_(1 / size).add_(eps).rsqrt_()
                y.mul_(scale).mul_(weights)
            if turns is not None:
                torch.view_as_complex(y.unflatten(-1, (-1, 2))).mul_(turns)
            q[piece].copy_(y[:, :, :heads].transpose(1, 2))
            k[piece].copy_(y[:, :, heads:].transpose(1, 2))
        of_norms = (None, None) if weights is None else (qkv, scales)  # rotating needs neither
        ctx.save_for_backward(*of_norms, query_weight, key_weight, cos, sin)
        ctx.heads, ctx.kv_heads, ctx.eps = heads, kv_heads, eps
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scales, query_weight, key_weight, cos, sin = ctx.saved_tensors
        nothing = (None, None, None, None, None)
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_q):
            # Gradients of gradients, or of many functions at once, as `torch.autograd.functional.jacobian` takes them.
            rotation = None if cos is None else (cos, sin)
            norms = norm_functions(query_weight, key_weight, ctx.eps)
            if qkv is None:  # a rotation's gradient is the same everywhere
                batch, _, slots, size = grad_q.shape
                qkv = cos.new_zeros(batch, slots, ctx.heads + 2 * ctx.kv_heads, size, requires_grad=True)
                qkv = qkv.to(grad_q.dtype)
            inputs = (qkv, query_weight, key_weight)
            with torch.enable_grad():
                made = by_operations(qkv, ctx.heads, ctx.kv_heads, norms, rotation)
            wanted = [each for each in inputs if each is not None and each.requires_grad]
            again = torch.is_grad_enabled()
            found = iter(torch.autograd.grad(made, wanted, (grad_q, grad_k, grad_v), create_graph=again))
            return (*(next(found) if each is not None and each.requires_grad else None for each in inputs), *nothing)
        batch, heads, slots, size = grad_q.shape
        both = heads + ctx.kv_heads
        grad = grad_q.new_empty(batch, slots, both + ctx.kv_heads, size)
        grad[:, :, both:].copy_(grad_v.transpose(1, 2))
        dtype = at_least_float32(grad[:0]).dtype
        weights = grad_weights = None
        if query_weight is not None:
            weights = norm_weights(query_weight, key_weight, heads, ctx.kv_heads, dtype)
            grad_weights = torch.zeros_like(weights)
        back = None if cos is None else turns_of(cos.to(dtype), -sin.to(dtype)).unsqueeze(-2)
        for piece, (y, *further) in pieces(grad, both, dtype, 1 if weights is None else 3):
            y[:, :, :heads].copy_(grad_q[piece].transpose(1, 2))
            y[:, :, heads:].copy_(grad_k[piece].transpose(1, 2))
            if back is not None:
                torch.view_as_complex(y.unflatten(-1, (-1, 2))).mul_(back)
            if weights is not None and grad_weights is not None:
                scale, (x, product) = scales[piece], further
                x.copy_(qkv[piece, :, :both]).mul_(scale)  # normed, without the weights
                torch.mul(y, x, out=product)
                grad_weights += product.sum((0, 1))
                mean = product.mul_(weights).sum(-1, keepdim=True).mul_(1 / size)
                y.mul_(weights).addcmul_(x, mean, value=-1).mul_(scale)
            grad[piece, :, :both].copy_(y)
        if grad_weights is None:
            return grad, None, None, *nothing
        parts = grad_weights[:heads].sum(0), grad_weights[heads:].sum(0)
        return grad, parts[0].to(query_weight.dtype), parts[1].to(key_weight.dtype), *nothing


def pieces(qkv: Tensor, both: int, dtype: torch.dtype, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Samples that are computed together, and tensors (B', S, H + K, d) to compute in, the same for all pieces."""
    batch, slots, _, size = qkv.shape
    each = max(1, PIECE // max(1, slots * both * size)) if qkv.device.type == "cpu" else max(1, batch)
    room = [qkv.new_empty(min(each, batch), slots, both, size, dtype=dtype) for _ in range(buffers)]
    for first in range(0, batch, each):
        count = min(each, batch - first)
        yield slice(first, first + count), [buffer[:count] for buffer in room]


def norm_weights(query_weight: Tensor, key_weight: Tensor, heads: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """What each head's numbers are multiplied by, (H + K, d)."""
    query, key = (1 + weight.detach().to(dtype) for weight in (query_weight, key_weight))
    return torch.cat([query.expand(heads, -1), key.expand(kv_heads, -1)])
