"""One token through a block's Transformer: the same numbers as `TokenNetwork.run`, with as few operations as possible.

Small batches are bound by the number of operations and by memory traffic, not by arithmetic. So everything that all steps
share is prepared once, and the loop uses plain tensors instead of modules. Where something acts on the modules, such as
hooks or quantized weights (see `prepared`), steps call the modules instead.

Shapes: R rows (samples, twice as many under guidance), D width, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.decoding.attention import ATTENTION_WAYS, AttentionWay, attention_ways, cached_attention
from tarflow.flows.layers.affine import at_least_float32, log_scale_of
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.kv_cache import KVCache
from tarflow.flows.layers.network import BlockContext
from tarflow.flows.layers.positions import turns_of
from tarflow.flows.layers.prepared import may_prepare, plain_linear
from tarflow.flows.layers.transformer import LayerNorm, RMSNorm

#: From so many rows on, a CPU's matrix products of weights laid out (in, out) take 0.6 to 0.85 of the time, unless the
#: input is wider than the output; copying the weights once costs less than that saves in a sequence.
ROWS_FOR_LAYOUT = 8


Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """What a step needs of one layer; matrices are transposed, as `torch.addmm` takes them."""

    attention_norm: Norm
    qkv: tuple[Tensor, Tensor]
    query_norm: Norm | None
    key_norm: Norm | None
    proj: tuple[Tensor, Tensor]
    attention_post_norm: Norm | None
    mlp_norm: Norm
    up: tuple[Tensor, Tensor]
    gated: bool
    down: tuple[Tensor, Tensor]
    mlp_post_norm: Norm | None
    keys_values: Tensor  # of the cache: (R, 2, K, capacity, d)


def decode_step(
    block: Block, context: BlockContext, cache: KVCache, temperature: Tensor | None = None
) -> DecodeStep | ModuleStep:
    """A `DecodeStep` if the block's weights are all that its layers are, else a `ModuleStep`."""
    return (DecodeStep if may_prepare(block) else ModuleStep)(block, context, cache, temperature)


class ModuleStep:
    """As `DecodeStep`, through the block's modules: slower, and right whatever acts on them."""

    def __init__(self, block: Block, context: BlockContext, cache: KVCache, temperature: Tensor | None = None):
        self.block, self.context, self.cache, self.temperature = block, context, cache, temperature

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The next token's parameters, (R, C) both, from what sits in the next slot, (R, C)."""
        slot = self.cache.length - self.context.prefix_length
        parameters = self.block.affine_parameters(inputs[:, None], slot, self.context, self.cache, self.temperature)
        shift, log_scale = parameters
        return shift[:, 0], log_scale[:, 0]


class DecodeStep:
    """Shift and log-scale of one token after another.

    Args:
        block: a `FlowBlock` that `may_prepare` allows; its weights must not change while the step is used.
        context: what `block.context` gave.
        cache: keys and values of R rows; it holds the prefix, if there is one, and grows by one slot at each call.
        temperature: divides the attention logits, (R, 1, 1, 1), or None.
    """

    #: Whether pairs may be rotated as complex numbers, which compilers do not take.
    complex_rotation = True

    def __init__(self, block: Block, context: BlockContext, cache: KVCache, temperature: Tensor | None = None):
        self.cache, self.config = cache, block.config
        self.copies: list[tuple[Tensor, Callable[[], Tensor]]] = []  # prepared tensors, and how they are made
        self.prefix_length = context.prefix_length
        self.added: Any = None if context.added is None else context.added.unbind(1)  # a (B or 1, D) for each slot
        self.inverse_temperature = None if temperature is None else 1 / temperature.view(-1, 1)
        transformer = block.config.transformer
        self.heads, self.kv_heads, self.head_dim = transformer.num_heads, transformer.num_kv_heads, transformer.head_dim
        self.rotated = (self.heads + self.kv_heads) * self.head_dim  # columns of queries and keys
        dtype = block.proj_in.weight.dtype
        self.cos: Any = None  # rows of a table: a tuple of tensors, or one tensor in a `StaticStep`
        self.sin: Any = None
        self.turns: tuple[Tensor, ...] | None = None
        if context.rotation is not None:  # a row for each slot, of all heads' queries and keys
            repeats = self.heads + self.kv_heads
            cos, sin = (table.repeat(1, repeats).to(dtype) for table in context.rotation)
            if self.complex_rotation and dtype in (torch.float32, torch.float64):
                turns = turns_of(cos, sin)
                values = turns.new_ones(len(turns), self.kv_heads * self.head_dim // 2)  # which are not turned
                self.turns = torch.cat([turns, values], dim=1).unbind(0)
            else:
                self.cos, self.sin = cos.unbind(0), sin.unbind(0)
        self.proj_in, self.dtype = self.transposed(block.proj_in), dtype
        self.final_norm = None if block.final_norm is None else self.norm_function(block.final_norm, dtype)
        self.soft_clip = self.config.soft_clip
        self.proj_out = self.transposed(block.proj_out, scale=1 / self.soft_clip if self.soft_clip else 1, wide=True)
        self.layers = [self.layer_weights(layer, index, dtype) for index, layer in enumerate(block.layers)]

    def layer_weights(self, layer: Any, index: int, dtype: torch.dtype) -> LayerWeights:
        attention, mlp, rows = layer.attention, layer.mlp, self.cache.keys_values.shape[1]
        return LayerWeights(
            self.norm_function(attention.norm, dtype),
            self.transposed(attention.qkv, rows),
            self.head_norm(attention.query_norm, dtype),
            self.head_norm(attention.key_norm, dtype),
            self.transposed(attention.proj, rows),
            self.norm_function(attention.post_norm, dtype),
            self.norm_function(mlp.norm, dtype),
            self.transposed(mlp.up, rows),
            mlp.gated,
            self.transposed(mlp.down, rows),
            self.norm_function(mlp.post_norm, dtype),
            self.cache.keys_values[index],
        )

    def kept(self, make: Callable[[], Tensor], weight: Tensor | None) -> Tensor:
        """What ``make`` gives; if that is no view of ``weight`` but a copy, it is made anew by `refresh`."""
        made = make()
        if weight is None or made.data_ptr() != weight.data_ptr():
            self.copies.append((made, make))
        return made

    def refresh(self) -> None:
        """Take over the weights' present numbers, in place."""
        for made, make in self.copies:
            made.copy_(make())

    def transposed(self, linear: Any, rows: int = 0, scale: float = 1, wide: bool = False) -> tuple[Tensor, Tensor]:
        """Weight (in, out) and bias (out,), zeros if there is none. The weight is a view, or for many rows on a CPU a
        copy in that layout if the product is faster with it.

        Args:
            linear: the layer.
            rows: of the products; 0 for a view.
            scale: of the product.
            wide: in at least float32.
        """

        def part(index: int) -> Tensor:
            value = plain_linear(linear)[index]
            if value is None:
                return linear.weight.new_zeros(linear.out_features)
            value = at_least_float32(value) if wide else value
            value = value if scale == 1 else value * scale
            if index:
                return value
            copies = value.device.type == "cpu" and rows >= ROWS_FOR_LAYOUT and value.shape[1] <= value.shape[0]
            return value.t().contiguous() if copies else value.t()

        return self.kept(lambda: part(0), linear.weight), self.kept(lambda: part(1), linear.bias)

    def norm_function(self, module: Any, dtype: torch.dtype) -> Any:
        """A norm as a function of as few operations as there are for the numbers' dtype. None for None."""
        if module is None or not isinstance(module, (LayerNorm, RMSNorm)):
            return module
        shape, eps, wide = module.weight.shape, module.eps, dtype in (torch.float32, torch.float64)
        if isinstance(module, LayerNorm):
            weight, bias = module.weight.detach(), module.bias.detach()
            return lambda x: torch.layer_norm(x, shape, weight, bias, eps)  # of 16 bits computes in float32 inside
        if wide:
            weight = self.kept(lambda: 1 + module.weight.detach(), None)
            # torch.rms_norm is several times slower than these on a CPU, and the same elsewhere.
            return lambda x: x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_() * weight
        weight = self.kept(lambda: 1 + module.weight.detach().float(), None)
        return lambda x: torch.rms_norm(x.float(), shape, weight, eps).to(x.dtype)

    def head_norm(self, module: Any, dtype: torch.dtype) -> Any:
        """The norm of queries or keys; only in 16 bits something is gained."""
        return module if dtype in (torch.float32, torch.float64) else self.norm_function(module, dtype)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The next token's parameters.

        Args:
            inputs: what sits in the next slot, (R, C).

        Returns:
            shift and log_scale (R, C), at least float32.
        """
        parameters = self.parameters(inputs, self.cache.length)
        self.cache.advance(1)
        return parameters

    def parameters(self, inputs: Tensor, position: Any) -> tuple[Tensor, Tensor]:
        """The parameters of the token whose input sits at a position of the cache, which counts the prefix too."""
        return self.leave(self.run_layers(self.enter(inputs, position), position))

    def enter(self, inputs: Tensor, position: Any) -> Tensor:
        """What the first layer gets, (R, D)."""
        weight, bias = self.proj_in
        hidden = torch.addmm(bias, inputs.to(self.dtype), weight)
        return hidden if self.added is None else hidden + self.row(self.added, position - self.prefix_length)

    def run_layers(self, hidden: Tensor, position: Any) -> Tensor:
        """All layers, (R, D); writes the slot's keys and values to the cache."""
        for layer in self.layers:
            hidden = self.add_product(
                hidden, self.attend(layer, hidden, position), layer.proj, layer.attention_post_norm
            )
            weight, bias = layer.up
            y = torch.addmm(bias, layer.mlp_norm(hidden), weight)
            if layer.gated:
                gate, y = y.chunk(2, dim=-1)
                y = F.gelu(gate, approximate="tanh").mul_(y)
            else:
                y = F.gelu(y)
            hidden = self.add_product(hidden, y, layer.down, layer.mlp_post_norm)
        return hidden

    def leave(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale of what the last layer gave."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        weight, bias = self.proj_out
        out = torch.addmm(bias, hidden.to(weight.dtype), weight)
        if self.soft_clip:
            out = out.tanh_().mul_(self.soft_clip)
        if self.config.scale == "additive":
            return out, torch.zeros_like(out)
        raw, shift = out.chunk(2, dim=-1)
        return shift, log_scale_of(raw, self.config.scale)

    @staticmethod
    def add_product(hidden: Tensor, y: Tensor, linear: tuple[Tensor, Tensor], norm: Any) -> Tensor:
        """hidden + norm(y·weight + bias), (R, D); without a norm in place, which spares a copy of the bias."""
        weight, bias = linear
        if norm is None:
            return hidden.addmm_(y, weight).add_(bias)
        return hidden + norm(torch.addmm(bias, y, weight))

    @staticmethod
    def row(rows: Any, position: Any) -> Tensor:
        """One slot's row of a table."""
        return rows[position]

    def attend_cache(self, q: Tensor, keys_values: Tensor, new: Tensor, position: Any) -> Tensor:
        """Write a slot's keys and values (R, 2, K, d) and attend to all up to them, (R, H·d)."""
        keys_values.select(3, position).copy_(new)
        keys, values = keys_values.narrow(3, 0, position + 1).unbind(1)
        # The heads of a group are queries of one key/value head.
        q = q.view(len(q), self.kv_heads, -1, self.head_dim)
        y = F.scaled_dot_product_attention(q, keys, values, scale=1 / math.sqrt(self.head_dim))
        return y.reshape(len(q), -1)

    def attend(self, layer: LayerWeights, hidden: Tensor, position: Any) -> Tensor:
        """One layer's heads side by side, (R, H·d); writes the slot's keys and values to the cache."""
        rows, head_dim = hidden.shape[0], self.head_dim
        weight, bias = layer.qkv
        qkv = torch.addmm(bias, layer.attention_norm(hidden), weight)
        qk = qkv.narrow(1, 0, self.rotated)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = qk.view(rows, -1, head_dim).split([self.heads, self.kv_heads], dim=1)
            qk.copy_(torch.cat([layer.query_norm(q), layer.key_norm(k)], dim=1).view(rows, -1))
        if self.turns is not None:  # the pairs (x₀, x₁) as x₀ + i·x₁, in one operation
            torch.view_as_complex(qkv.view(rows, -1, 2)).mul_(self.row(self.turns, position))
        elif self.cos is not None:  # (x₀, x₁) → (x₀·cos − x₁·sin, x₁·cos + x₀·sin) for all pairs
            swapped = qk.view(rows, -1, 2).flip(-1).view(rows, -1)
            qk.mul_(self.row(self.cos, position)).addcmul_(swapped, self.row(self.sin, position))
        q = qkv.narrow(1, 0, self.heads * head_dim)
        if self.inverse_temperature is not None:
            q = (q * self.inverse_temperature).to(self.dtype)
        new = qkv.narrow(1, self.heads * head_dim, 2 * self.kv_heads * head_dim)
        return self.attend_cache(q, layer.keys_values, new.view(rows, 2, self.kv_heads, head_dim), position)


class StaticStep(DecodeStep):
    """The same with shapes that never change, for compilers and CUDA graphs: the position is a tensor, and so attention
    is `cached_attention`.

    The tensors of one sequence (prefix, positions, class vectors, temperature) are buffers that `load` fills, so that
    what was compiled or captured for one sequence serves the next.
    """

    complex_rotation = False

    def __init__(self, block: Block, context: BlockContext, cache: KVCache, temperature: Tensor | None = None):
        super().__init__(block, context, cache, temperature)
        for name in ("cos", "sin", "added"):
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, torch.stack(rows))
        stored = cache.keys_values
        self.attention_way = ATTENTION_WAYS[0]
        self.attention = cached_attention(stored.device, stored.dtype, self.head_dim)

    def ways(self) -> list[StaticStep]:
        """This step by each way of attention that there is for it; all have its weights, buffers and cache."""
        stored = self.cache.keys_values
        return [self.by(way) for way in attention_ways(stored.device, stored.dtype, self.head_dim)]

    def by(self, way: AttentionWay) -> StaticStep:
        """This step by another way of attention, with the same weights, buffers and cache."""
        other, stored = copy.copy(self), self.cache.keys_values
        other.attention_way = way
        other.attention = cached_attention(stored.device, stored.dtype, self.head_dim, way)
        return other

    def load(self, context: BlockContext, cache: KVCache, temperature: Tensor | None) -> None:
        """Take over another sequence of the same shapes: its prefix in a cache, positions, vectors, temperature."""
        prefix = cache.length
        self.cache.keys_values[..., :prefix, :].copy_(cache.keys_values[..., :prefix, :])
        if self.cos is not None and context.rotation is not None:
            for buffer, table in zip((self.cos, self.sin), context.rotation, strict=True):
                buffer.copy_(table.repeat(1, self.heads + self.kv_heads))
        if self.added is not None and context.added is not None:
            self.added.copy_(context.added.transpose(0, 1))
        if self.inverse_temperature is not None and temperature is not None:
            self.inverse_temperature.copy_(1 / temperature.view(-1, 1))
        self.cache.length = prefix

    @staticmethod
    def row(rows: Tensor, position: Tensor) -> Tensor:
        """One slot's row of a table (S, …)."""
        return rows.index_select(0, position.view(1)).squeeze(0)

    def attend_cache(self, q: Tensor, keys_values: Tensor, new: Tensor, position: Tensor) -> Tensor:
        keys_values.index_copy_(3, position.view(1), new.unsqueeze(3))
        return self.attention(q, keys_values, position)
