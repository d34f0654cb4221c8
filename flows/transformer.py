"""Pre-norm Transformer layers: norms, attention, MLP.

Shapes: B batch, S slots of the sequence, D width, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.flows.affine import at_least_float32
from tarflow.flows.config import BlockConfig
from tarflow.flows.kv_cache import KVCache
from tarflow.flows.positions import rotate

#: Longest sequence for which plain matrix products train faster on a CPU than the fused attention kernel.
PLAIN_ATTENTION_SLOTS = 256


class LayerNorm(nn.Module):
    """Layer normalisation (eps 1e-5), computed in at least float32."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = at_least_float32(x)
        return F.layer_norm(y, y.shape[-1:], self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (eps 1e-6), computed in at least float32; the weight w acts as 1 + w."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = at_least_float32(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.to(y.dtype))).to(x.dtype)


class OutputLinear(nn.Linear):
    """A linear layer that computes in at least float32, whatever its weight's dtype, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def make_norm(config: BlockConfig, width: int) -> nn.Module:
    return RMSNorm(width) if config.norm == "rms_norm" else LayerNorm(width)


class Attention(nn.Module):
    """Self-attention, causal or full, with optional grouped heads, QK-norm, rotary positions and post-norm."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.causal = config.causal
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.norm = make_norm(config, config.width)
        self.qkv = nn.Linear(config.width, rows, bias=config.bias)
        self.query_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.proj = nn.Linear(self.heads * self.head_dim, config.width, bias=config.bias)
        self.post_norm = RMSNorm(config.width) if config.post_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        temperature: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x (B, S, D) → (B, S, D), to be added to x.

        Args:
            rotation: tables of these S slots, see `rotation_tables`; None without rotary positions.
            temperature: divides the attention logits, (B, 1, 1, 1).
            cache: earlier slots, which these S follow; this layer's row of it is ``layer``.
        """
        batch, slots, _ = x.shape
        heads = self.heads + 2 * self.kv_heads
        qkv = self.qkv(self.norm(x)).view(batch, slots, heads, self.head_dim).transpose(1, 2)  # (B, H + 2K, S, d)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.query_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.query_norm(q), self.key_norm(k)], dim=1)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if temperature is not None:
            q = q / temperature.to(q.dtype)
        earlier = 0
        if cache is not None:
            earlier = cache.length
            k, v = cache.write(layer, k, v)
        y = attend(q, k, v, earlier if self.causal else None)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y if self.post_norm is None else self.post_norm(y)


def later_slots_mask(slots: int, earlier: int, device: torch.device) -> Tensor:
    """Which keys (earlier + S) each of S new slots may see, (S, earlier + S) booleans."""
    return torch.ones(slots, earlier + slots, dtype=torch.bool, device=device).tril(earlier)


def attend(q: Tensor, k: Tensor, v: Tensor, earlier: int | None) -> Tensor:
    """Attention of queries (B, H, S, d) to keys and values (B, K, N, d); returns (B, H, S, d).

    Args:
        earlier: query i sees the first earlier + i + 1 keys; None for all keys.
    """
    grouped, slots = q.shape[1] != k.shape[1], q.shape[2]
    causal = earlier is not None and slots > 1
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and k.shape[2] <= PLAIN_ATTENTION_SLOTS:
        # The backward pass of the fused CPU kernel takes several times as long as plain products of short sequences.
        if grouped:
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        unseen = q.new_zeros(slots, k.shape[2])
        if causal:
            unseen.masked_fill_(~later_slots_mask(slots, earlier, q.device), -math.inf)
        rows = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
        logits = torch.baddbmm(unseen, *rows, alpha=1 / math.sqrt(q.shape[-1])).unflatten(0, q.shape[:2])
        return logits.softmax(-1, dtype=at_least_float32(logits).dtype).to(v.dtype) @ v
    triangle = causal and not earlier  # for which there are faster kernels than for a mask
    mask = later_slots_mask(slots, earlier, q.device) if causal and not triangle else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle, enable_gqa=grouped)


class MLP(nn.Module):
    """Two-layer perceptron with exact GELU, or GeGLU: down(gelu_tanh(gate)·up)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        hidden = config.width * config.mlp_ratio
        self.gated = config.mlp == "geglu"
        self.norm = make_norm(config, config.width)
        self.up = nn.Linear(config.width, hidden * (2 if self.gated else 1), bias=config.bias)  # [gate; up] if gated
        self.down = nn.Linear(hidden, config.width, bias=config.bias)
        self.post_norm = RMSNorm(config.width) if config.post_norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        if self.gated:
            gate, y = y.chunk(2, dim=-1)
            y = F.gelu(gate, approximate="tanh") * y
        else:
            y = F.gelu(y)
        y = self.down(y)
        return y if self.post_norm is None else self.post_norm(y)


class TransformerLayer(nn.Module):
    """Attention and MLP, each added to its input."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        temperature: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.attention(x, rotation, temperature, cache, layer)
        return x + self.mlp(x)
