"""Scaled dot-product attention, causal or full, by plain products, PyTorch's kernels or one of Diffusers' backends.

Shapes: B batch, S new slots, N slots that are seen (earlier ones and the new), H query heads, K key/value heads, d head
size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName as Backend
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

from tarflow.flows.layers.affine import at_least_float32

#: Longest sequence for which plain matrix products train faster on a CPU than the fused attention kernel.
PLAIN_ATTENTION_SLOTS = 256
#: Backends that take a mask of queries and keys, for new slots behind earlier ones.
TAKE_MASKS = ("native", "_native_math", "_native_efficient", "_native_cudnn", "_native_npu")
#: Backends whose causal flag lets the last query see the last key, also where there are more keys than queries; that of
#: the others lets the first query see the first key alone.
LAST_SEES_LAST = (
    "flash",
    "flash_hub",
    "flash_varlen",
    "flash_varlen_hub",
    "flash_4_hub",
    "_flash_3",
    "_flash_varlen_3",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "aiter_fa2_hub",
)


class AttentionProcessor:
    """What Diffusers' `set_attention_backend` sets the backend of; every `Attention` layer has its own."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, earlier: int | None) -> Tensor:
        """As `attend`, by the backend that was chosen."""
        return attend(q, k, v, earlier, chosen_backend(self._attention_backend))


def chosen_backend(own: Any = None) -> Backend | None:
    """The layer's own backend, or else that of ``with attention_backend(…)`` or DIFFUSERS_ATTN_BACKEND. None is the
    default, for which this module takes the fastest."""
    if own is not None:
        return own if isinstance(own, Backend) else Backend(own)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    return None if active == Backend.NATIVE else active


def later_slots_mask(slots: int, earlier: int, device: torch.device) -> Tensor:
    """Which keys (earlier + S) each of S new slots may see, (S, earlier + S) booleans."""
    return torch.ones(slots, earlier + slots, dtype=torch.bool, device=device).tril(earlier)


def attend(q: Tensor, k: Tensor, v: Tensor, earlier: int | None, backend: Backend | None = None) -> Tensor:
    """Attention of queries (B, H, S, d) to keys and values (B, K, N, d); returns (B, H, S, d).

    Args:
        earlier: query i sees the first earlier + i + 1 keys; None for all keys.
        backend: of Diffusers; None takes what is fastest.
    """
    if backend is not None:
        return attend_by(backend, q, k, v, earlier)
    grouped, slots = q.shape[1] != k.shape[1], q.shape[2]
    behind = earlier if slots > 1 else None  # a single query sees all that there is
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and k.shape[2] <= PLAIN_ATTENTION_SLOTS:
        # The backward pass of the fused CPU kernel takes several times as long as plain products of short sequences.
        k, v = repeated_heads(q, k, v)
        unseen = q.new_zeros(slots, k.shape[2])
        if behind is not None:
            unseen.masked_fill_(~later_slots_mask(slots, behind, q.device), -math.inf)
        rows = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
        logits = torch.baddbmm(unseen, *rows, alpha=1 / math.sqrt(q.shape[-1])).unflatten(0, q.shape[:2])
        return logits.softmax(-1, dtype=at_least_float32(logits).dtype).to(v.dtype) @ v
    triangle = behind == 0  # for which there are faster kernels than for a mask
    mask = None if behind is None or triangle else later_slots_mask(slots, behind, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle, enable_gqa=grouped)


def attend_by(backend: Backend, q: Tensor, k: Tensor, v: Tensor, earlier: int | None) -> Tensor:
    """`attend` by one of Diffusers' backends. Most take no mask, but a flag for causal attention, so that is used
    wherever it means what is meant."""
    slots, seen = q.shape[2], k.shape[2]
    k, v = repeated_heads(q, k, v)  # few backends take groups of heads
    q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))  # (B, S or N, H, d)
    behind = earlier if slots > 1 else None
    causal, pad, mask = behind is not None, 0, None
    needs_mask = backend in (Backend.FLEX, Backend._NATIVE_NPU) or (behind and backend.value in TAKE_MASKS)
    if behind is not None and needs_mask:
        # FLEX and _NATIVE_NPU do not look at the flag.
        mask, causal = causal_mask(backend, slots, behind, q.device), False
    elif causal and seen > slots and backend.value not in LAST_SEES_LAST:
        pad = seen - slots  # queries in the earlier slots' places, which nobody reads, make the two flags mean the same
        q = F.pad(q, (0, 0, 0, 0, pad, 0))
    y = dispatch_attention_fn(q, k, v, attn_mask=mask, is_causal=causal, backend=backend)
    return y[:, pad:].transpose(1, 2)


def causal_mask(backend: Backend, slots: int, earlier: int, device: torch.device) -> Any:
    """`later_slots_mask` as a backend takes it."""
    if backend != Backend.FLEX:
        # (1, 1, S, N): one of two axes is taken for a mask of keys, (B, N), where S is B.
        return later_slots_mask(slots, earlier, device)[None, None]
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + earlier

    return create_block_mask(is_seen, None, None, slots, earlier + slots, device=device)


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, N, d), one for each query head, from those of groups (B, K, N, d)."""
    if q.shape[1] == k.shape[1]:
        return k, v
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
