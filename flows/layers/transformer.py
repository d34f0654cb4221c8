"""Pre-norm Transformer layers: norms, attention, MLP.

Shapes: B batch, S slots of the sequence, D width, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.layers.attention import AttentionProcessor
from tarflow.flows.layers.config import TransformerConfig
from tarflow.flows.layers.heads import Heads, by_operations, rms_normed, turned_heads
from tarflow.flows.layers.hooks import globally_hooked, is_hooked
from tarflow.flows.layers.kv_cache import Cache
from tarflow.flows.layers.positions import Rotation


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
        return rms_normed(x, self.weight, self.eps)


class OutputLinear(nn.Linear):
    """A linear layer that computes in at least float32, whatever its weight's dtype, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def make_norm(config: TransformerConfig, width: int) -> nn.Module:
    return RMSNorm(width) if config.norm == "rms_norm" else LayerNorm(width)


class Attention(nn.Module, AttentionModuleMixin):
    """Self-attention, causal or full, with optional grouped heads, QK-norm, rotary positions and post-norm.

    Diffusers' backends are chosen by the model's `set_attention_backend` and the like; `AttentionProcessor` has them.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)
    _supports_qkv_fusion = False  # they are one layer from the start

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.set_processor(AttentionProcessor())
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.causal = config.causal
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.norm = make_norm(config, config.width)
        self.qkv = nn.Linear(config.width, rows, bias=config.bias)
        self.query_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.proj = nn.Linear(self.heads * self.head_dim, config.width, bias=config.bias)
        self.post_norm = RMSNorm(config.width) if config.post_norm else None

    def set_processor(self, processor: AttentionProcessor) -> None:
        """Only an `AttentionProcessor` fits: decoding token after token repeats what these layers compute.

        Raises:
            ValueError: for another one.
        """
        if type(processor) is not AttentionProcessor:
            name = type(processor).__name__
            raise ValueError(
                f"{name} does not fit these attention layers, which take AttentionProcessor only; for another kernel "
                "call set_attention_backend"
            )
        self.processor = processor

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        temperature: Tensor | None = None,
        cache: Cache | None = None,
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
        qkv = self.qkv(self.norm(x)).view(batch, slots, heads, self.head_dim)
        q, k, v = self.turned(qkv, rotation)
        if temperature is not None:
            q = q / temperature.to(q.dtype)
        earlier = 0
        if cache is not None:
            earlier = cache.length
            k, v = cache.write(layer, k, v)
        y = self.processor(q, k, v, earlier if self.causal else None)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y if self.post_norm is None else self.post_norm(y)

    def turned(self, qkv: Tensor, rotation: Rotation | None) -> Heads:
        """Queries, keys and values of their product (B, S, H + 2K, d), normed and rotated."""
        query_norm, key_norm = self.query_norm, self.key_norm
        if query_norm is None or key_norm is None:
            return turned_heads(qkv, self.heads, self.kv_heads, None, rotation)
        if may_be_read(query_norm) and may_be_read(key_norm) and not globally_hooked():
            norms = query_norm.weight, key_norm.weight, query_norm.eps
            return turned_heads(qkv, self.heads, self.kv_heads, norms, rotation)
        return by_operations(qkv, self.heads, self.kv_heads, (query_norm, key_norm), rotation)


def may_be_read(norm: nn.Module) -> bool:
    """Whether a norm may be computed by its weight, and need not be called."""
    return type(norm) is RMSNorm and not is_hooked(norm)


class MLP(nn.Module):
    """Two-layer perceptron with exact GELU, or GeGLU: down(gelu_tanh(gate)·up)."""

    def __init__(self, config: TransformerConfig):
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

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        temperature: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.attention(x, rotation, temperature, cache, layer)
        return x + self.mlp(x)
