"""All layers of a token by one kernel (`triton_resident`), for few rows on a CUDA device; `FastSteps` takes it if it is the
fastest way and makes the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tarflow.flows.decoding.fused import Way, linears_of
from tarflow.flows.decoding.step import StaticStep
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.transformer import LayerNorm

#: To choose from, and how many programs of each share a multiprocessor.
RESIDENT_WAYS = (
    Way("one kernel, 16384 elements", 16384, resident=1),
    Way("one kernel, 16384 elements, 16 warps", 16384, warps=16, resident=1),
    Way("one kernel, 8192 elements, two programs", 8192, resident=2),
    Way("one kernel, 8192 elements, 4 warps, two programs", 8192, warps=4, resident=2),
)
#: Bytes between what is counted, so that counting does not hold up what else is written.
APART = 128
#: Weights must begin at multiples of so many numbers, for loads of 16 bytes.
ALIGNED = 8
#: Parts of a head's cached slots, at most.
MOST_SPLITS = 16


def can_stay(block: Block, step: StaticStep) -> bool:
    """Whether one kernel can compute a block's layers, of which `fused.suits` is true: a head of keys for each head of queries,
    GELU, and weights of one kind of numbers that begin at whole places."""
    layers = (tensors_of(layer, step, index) for index, layer in enumerate(block.layers))
    weights = [tensor for layer in layers for tensor in layer if tensor is not None]
    size = weights[0].element_size()
    return (
        step.heads == step.kv_heads
        and step.heads * step.head_dim == block.config.transformer.width
        and not any(layer.mlp.gated for layer in block.layers)
        and all(tensor.dtype == step.dtype and tensor.is_contiguous() for tensor in weights)
        and all(tensor.data_ptr() % (ALIGNED * size) == 0 for tensor in weights)
    )


def tensors_of(module: Any, step: StaticStep, index: int) -> list[Tensor | None]:
    """A layer's weights in the order of `triton_resident.PARTS`; matrices as they are stored, (out, in)."""
    prepared = step.layers[index]
    (qkv, qkv_bias), (proj, proj_bias), (up, up_bias), (down, down_bias) = (
        (weight.t(), bias) for weight, bias in (prepared.qkv, prepared.proj, prepared.up, prepared.down)
    )
    norm, mlp_norm = (
        (part.weight.detach(), part.bias.detach() if isinstance(part, LayerNorm) else None)
        for part in (module.attention.norm, module.mlp.norm)
    )
    heads = (module.attention.query_norm, module.attention.key_norm)
    head_norms = (None if part is None else part.weight.detach() for part in heads)
    return [qkv, qkv_bias, *norm, *head_norms, proj, proj_bias, up, up_bias, *mlp_norm, down, down_bias]


class ResidentLayers:
    """Called with hidden (R, D) and the position, gives hidden after all layers, and writes to the step's cache.

    Args:
        block: whose layers `can_stay`.
        step: has their weights, as they are used.
        way: one of `RESIDENT_WAYS`.
        programs: of the kernel; None for as many as the device is to hold at once.
    """

    def __init__(self, block: Block, step: StaticStep, way: Way, programs: int | None = None):
        from tarflow.flows.decoding import triton_resident  # where there is Triton

        self.kernel, self.step, self.way = triton_resident.launched, step, way
        device, rows = step.cache.keys_values.device, step.cache.keys_values.shape[1]
        width = block.config.transformer.width
        #: Of programs that wait for one another all must be there at once.
        self.cooperative = programs is None
        if programs is None:
            programs = way.resident * torch.cuda.get_device_properties(device).multi_processor_count
        self.programs = programs
        self.weights = [tensors_of(module, step, index) for index, module in enumerate(block.layers)]
        self.base = self.weights[0][0]
        assert self.base is not None
        begin, size = self.base.data_ptr(), self.base.element_size()
        places = [[0 if one is None else (one.data_ptr() - begin) // size for one in row] for row in self.weights]
        self.table = torch.tensor(places, dtype=torch.int64, device=device)
        self.inner = linears_of(block.layers[0])[2].out_features
        self.norm, self.query_norm = block.layers[0].attention.norm, block.layers[0].attention.query_norm
        pairs = rows * step.heads
        self.splits = max(1, min(MOST_SPLITS, programs // pairs))
        new = self.base.new_empty
        self.middle, self.attended, self.qkv, self.up = (
            new(rows, columns) for columns in (width, width, 3 * width, self.inner)
        )
        parts = pairs * self.splits
        self.sums = torch.empty(parts, step.head_dim, dtype=torch.float32, device=device)
        self.most, self.total = (torch.empty(parts, dtype=torch.float32, device=device) for _ in range(2))
        #: How many programs have come, and of each head how many parts are there.
        self.counts = torch.zeros(APART // 4 + pairs, dtype=torch.int32, device=device)

    def __call__(self, hidden: Tensor, position: Tensor) -> Tensor:
        self.counts.zero_()
        hidden = hidden.contiguous()
        self.kernel(self, hidden, position)
        return hidden
