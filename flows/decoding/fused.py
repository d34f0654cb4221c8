"""All layers of a token by few kernels (`triton_layer`), for few rows on a CUDA device.

Whether they are faster than the operations one by one depends on the card and the shape, so `FastSteps` times both and
takes the faster, and these only if they give the same numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarflow.flows.decoding.attention import DTYPES, HEAD_SIZES
from tarflow.flows.decoding.step import LayerWeights, StaticStep
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.transformer import LayerNorm, RMSNorm

#: So many rows at most: each program computes all rows from one reading of its weights.
MOST_ROWS = 4
#: The longest column of a weight.
LONGEST = 16384


class Way(NamedTuple):
    """Sizes by which the kernels can be started.

    Attributes:
        name: in reports.
        elements: of a weight that one program holds.
        warps: of a program of a product.
        part: slots of the cache that one program looks at.
        early: whether kernels start, and load weights, before the one before is complete; compute capability 9.0 and on.
        hints: whether the second-level cache is told to keep activations rather than weights.
        resident: programs of each multiprocessor that compute all layers of a token; 0 for six kernels a layer.
    """

    name: str
    elements: int
    warps: int = 8
    part: int = 128
    early: bool = False
    hints: bool = False
    resident: int = 0


#: To choose from; each takes one or two seconds to compile.
WAYS = (
    Way("fused, 16384 elements", 16384),
    Way("fused, 8192 elements, parts of 64", 8192, warps=4, part=64, hints=True),
    Way("fused, 16384 elements, 4 warps, parts of 64, early", 16384, warps=4, part=64, early=True, hints=True),
)


def suits(block: Block, step: StaticStep) -> bool:
    """Whether these kernels can take a block's steps."""
    stored, modules = step.cache.keys_values, list(block.layers)
    if stored.device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False  # as `cached_attention`, which reads slots that a trial has filled where there is no kernel
    return stored.dtype in DTYPES and step.dtype == stored.dtype and can_be_fused(modules, stored.shape[1], step)


def ways_on(device: torch.device) -> list[Way]:
    """Of a CUDA device with Triton."""
    from tarflow.flows.decoding.triton_layer import starts_early

    early = starts_early(device)
    return [way for way in WAYS if early or not way.early]


def can_be_fused(layers: list[Any], rows: int, step: StaticStep) -> bool:
    """The part of `suits` that does not depend on the device."""
    longest = max((max(linear.in_features for linear in linears_of(layer)) for layer in layers), default=LONGEST + 1)
    norms = [norm for layer in layers for norm in (layer.attention.norm, layer.mlp.norm)]
    after = [norm for layer in layers for norm in (layer.attention.post_norm, layer.mlp.post_norm)]
    return (
        rows <= MOST_ROWS
        and longest <= LONGEST
        and step.head_dim in HEAD_SIZES
        and all(type(norm) in (LayerNorm, RMSNorm) for norm in norms)
        and all(norm is None for norm in after)
    )


def linears_of(layer: Any) -> tuple[Any, ...]:
    return layer.attention.qkv, layer.attention.proj, layer.mlp.up, layer.mlp.down


class FusedLayers:
    """Called with hidden (R, D) and the position, gives hidden after all layers, and writes to the step's cache.

    Args:
        block: whose layers `can_be_fused`.
        step: has their weights, as they are used.
        way: one of `ways_on` the device.
    """

    def __init__(self, block: Block, step: StaticStep, way: Way):
        from tarflow.flows.decoding import triton_layer  # where there is Triton

        self.kernels, self.step, self.way = triton_layer, step, way
        self.calls = [self.layer(module, layer) for module, layer in zip(block.layers, step.layers, strict=True)]

    def __call__(self, hidden: Tensor, position: Tensor) -> Tensor:
        for call in self.calls:
            hidden = call(hidden, position)
        return hidden

    def layer(self, module: Any, weights: LayerWeights) -> Callable[[Tensor, Tensor], Tensor]:
        """One layer as a function of hidden and position. Weights are those of the step, or views of them."""
        product, attention, step, way = self.kernels.product, self.kernels.attention, self.step, self.way
        (qkv, qkv_bias), (proj, proj_bias), (up, up_bias), (down, down_bias) = (
            (weight.t(), bias) for weight, bias in (weights.qkv, weights.proj, weights.up, weights.down)
        )
        if not all(weight.is_contiguous() for weight in (qkv, proj, up, down)):
            raise ValueError("the weights of decode steps are laid out for another device")
        first, second = arguments_of(module.attention.norm), arguments_of(module.mlp.norm)
        query_norm, key_norm = module.attention.query_norm, module.attention.key_norm
        norms = None if query_norm is None else (query_norm.weight.detach(), key_norm.weight.detach())
        eps = 0.0 if query_norm is None else query_norm.eps
        activation = "geglu" if weights.gated else "gelu"

        def call(hidden: Tensor, position: Tensor) -> Tensor:
            rotation = None if step.cos is None else (step.cos, step.sin)
            y = product(hidden, qkv, qkv_bias, way, first)
            y = attention(y, weights.keys_values, position, rotation, norms, step.inverse_temperature, way, eps=eps)
            hidden = product(y, proj, proj_bias, way, residual=hidden)
            y = product(hidden, up, up_bias, way, second, activation)
            return product(y, down, down_bias, way, residual=hidden)

        return call


def arguments_of(norm: Any) -> tuple[str, Tensor, Tensor | None, float]:
    """A norm's kind, weight, bias and eps, as `triton_layer.product` takes them."""
    if isinstance(norm, LayerNorm):
        return "layer", norm.weight.detach(), norm.bias.detach(), norm.eps
    return "rms", norm.weight.detach(), None, norm.eps
