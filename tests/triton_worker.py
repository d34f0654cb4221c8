"""Checks the decoding kernels in Triton's interpreter, on a CPU; started by flows/decoding/test_cached_attention.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from helpers import small_model

from tarflow.flows.decoding import triton_attention as kernel
from tarflow.flows.decoding.fused import WAYS, FusedLayers, can_be_fused
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.step import StaticStep
from tarflow.flows.layers.guidance import Guidance


def main() -> None:
    torch.manual_seed(0)
    cases = 0
    for rows, kv_heads, group, capacity, size in ((2, 2, 1, 300, 64), (1, 2, 3, 129, 32), (3, 1, 2, 64, 16)):
        cache = torch.randn(rows, 2, kv_heads, capacity, size)
        heads = kv_heads * group
        q = torch.randn(rows, 3 * heads * size)[:, : heads * size]  # rows apart, as in a wider product
        for position in {0, 1, 63, 64, 127, 128, capacity - 1} & set(range(capacity)):
            behind = cache.clone()
            behind[:, :, :, position + 1 :] = torch.nan  # must not be read
            seen = cache[:, :, :, : position + 1]
            expected = F.scaled_dot_product_attention(q.reshape(rows, kv_heads, group, size), seen[:, 0], seen[:, 1])
            for elements in (0, 4096):
                found = kernel.launched(q, behind, torch.tensor(position), lambda function: function, elements)
                torch.testing.assert_close(found, expected.reshape(rows, -1), rtol=1e-5, atol=1e-5)
                cases += 1
    print(f"{cases} cases")
    print(f"{sum(layers_agree(**options) for options in LAYERS)} layers")


LAYERS: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": torch.bfloat16, "norm": "rms_norm", "mlp": "geglu", "qk_norm": True},
    {"norm": "rms_norm", "mlp": "geglu", "qk_norm": True, "num_kv_heads": 1, "width": 96, "temperature": 1.5},
    {"positions": "learned", "batch": 2},
    {"sample_size": 24, "layers_per_block": (1, 1), "qk_norm": True},  # whose keys are two programs'
)


def layers_agree(dtype: torch.dtype = torch.float32, temperature: float = 1.0, batch: int = 1, **options: Any) -> int:
    """All layers of a guided step by the kernels, and by the operations one by one: hidden numbers and the cache."""
    options = {"sample_size": 8, **options}
    model = small_model(conditioning="class_prefix", condition_blocks="deep", **options).to(dtype)
    block, count, side = model.blocks[-1], 0, options["sample_size"] // 2
    cond, null = model.condition(torch.arange(batch), None, batch), model.condition(None, None, batch)
    rounding = {"rtol": 2e-2, "atol": 7e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        how = Guidance(1.0, "linear" if temperature != 1 else "gaussian", temperature=temperature)
        run = InversionState(block, batch, (side, side), cond, null, how)
        step = StaticStep(block, run.context, run.cache, run.temperature)
        assert can_be_fused(list(block.layers), 2 * batch, step)
        first, other = (FusedLayers(block, step, way) for way in WAYS[:2])
        cache = step.cache.keys_values
        for position in (kernel.PART if side > 4 else 1, cache.shape[-2] - 1):
            earlier = torch.randn(cache.shape).to(dtype)
            hidden = torch.randn(2 * batch, block.config.transformer.width).to(dtype)
            results = []
            for layers in (step.run_layers, first, other):
                cache.copy_(earlier)
                results.append((layers(hidden.clone(), torch.tensor(position)), cache.clone()))
            assert not torch.equal(results[0][1], earlier)
            for found in results[1:]:
                for ours, exact in zip(found, results[0], strict=True):
                    torch.testing.assert_close(ours, exact, **rounding)
            count += len(block.layers)
    return count


if __name__ == "__main__":
    sys.exit(main())
