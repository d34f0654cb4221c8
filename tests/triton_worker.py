"""Checks the decoding kernels in Triton's interpreter, on a CPU; started by flows/decoding/test_cached_attention.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import torch
import torch.nn.functional as F
from helpers import small_model
from triton.runtime.interpreter import interpreter_builder

from tarflow.flows.decoding import triton_attention as kernel
from tarflow.flows.decoding import triton_resident
from tarflow.flows.decoding.fused import WAYS, FusedLayers, can_be_fused
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.resident import RESIDENT_WAYS, ResidentLayers, can_stay
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
    print(f"{programs_agree(rows=1, programs=3) + programs_agree(rows=2, programs=5)} programs")


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
        kernels: list[Any] = [FusedLayers(block, step, way) for way in WAYS[:2]]
        stays = not any(layer.mlp.gated for layer in block.layers)
        assert can_stay(block, step) == stays
        kernels += [ResidentLayers(block, step, way, programs=1) for way in RESIDENT_WAYS[:1] if stays]
        cache = step.cache.keys_values
        for position in (kernel.PART if side > 4 else 1, cache.shape[-2] - 1):
            earlier = torch.randn(cache.shape).to(dtype)
            hidden = torch.randn(2 * batch, block.config.transformer.width).to(dtype)
            results = []
            for layers in (step.run_layers, *kernels):
                cache.copy_(earlier)
                results.append((layers(hidden.clone(), torch.tensor(position)), cache.clone()))
            assert not torch.equal(results[0][1], earlier)
            for found in results[1:]:
                for ours, exact in zip(found, results[0], strict=True):
                    torch.testing.assert_close(ours, exact, **rounding)
            count += len(kernels) * len(block.layers)
    return count


def programs_agree(rows: int, programs: int) -> int:
    """Programs of the kernel of all layers that wait for one another, each in a process of its own with common memory."""
    model = small_model(conditioning="class_prefix", condition_blocks="deep", sample_size=8, width=32, qk_norm=True)
    block = model.blocks[-1]
    with torch.no_grad():
        run = InversionState(block, rows, (4, 4), model.condition(torch.arange(rows), None, rows), None, None)
        step = StaticStep(block, run.context, run.cache, run.temperature)
        layers = ResidentLayers(block, step, RESIDENT_WAYS[0]._replace(elements=64), programs)
        assert layers.splits == programs // rows > 1 and step.heads == 1
        cache, position = step.cache.keys_values, torch.tensor(11)
        earlier, hidden = torch.randn(cache.shape), torch.randn(rows, 32)
        cache.copy_(earlier)
        expected = step.run_layers(hidden.clone(), position), cache.clone()
        cache.copy_(earlier)
        for written in (cache, hidden, *(each for each in vars(layers).values() if isinstance(each, torch.Tensor))):
            if written is not layers.base:
                written.share_memory_()
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=one_program, args=(one, layers, hidden, position)) for one in range(programs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    assert layers.counts[0] == 5 * programs * len(block.layers)
    for ours, exact in zip((hidden, cache), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    return programs


def one_program(number: int, layers: ResidentLayers, hidden: torch.Tensor, position: torch.Tensor) -> None:
    """The interpreter would go through all programs, one after the other; here it has this one."""
    whole = triton_resident.all_layers

    class One:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert grid == (layers.programs,)
            return whole[(1,)]

    def set_place(*place: int) -> None:
        interpreter_builder.grid_idx = (number, 0, 0)

    interpreter_builder.set_grid_idx = set_place
    triton_resident.all_layers = One()
    layers.kernel(layers, hidden, position)


if __name__ == "__main__":
    sys.exit(main())
