"""Checks the decoding kernel in Triton's interpreter, on a CPU; started by test_cached_attention.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

SOURCE = Path(__file__).parents[1] / "flows" / "decoding" / "triton_attention.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("kernel", SOURCE)  # without the package, which takes seconds
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    torch.manual_seed(0)
    cases = 0
    for rows, kv_heads, group, capacity, size in ((2, 2, 1, 300, 64), (1, 2, 3, 129, 32), (3, 1, 2, 64, 16)):
        cache = torch.randn(rows, 2, kv_heads, capacity, size)
        heads = kv_heads * group
        q = torch.randn(rows, 3 * heads * size)[:, : heads * size]  # rows apart, as in a wider product
        for position in {0, 1, 63, 64, 127, 128, capacity - 1} & set(range(capacity)):
            behind = cache.clone()
            behind[:, :, :, position + 1 :] = torch.nan  # must not be read
            found = kernel.launched(q, behind, torch.tensor(position), lambda function: function)
            seen = cache[:, :, :, : position + 1]
            expected = F.scaled_dot_product_attention(q.reshape(rows, kv_heads, group, size), seen[:, 0], seen[:, 1])
            torch.testing.assert_close(found, expected.reshape(rows, -1), rtol=1e-5, atol=1e-5)
            cases += 1
    print(f"{cases} cases")


if __name__ == "__main__":
    sys.exit(main())
