"""Norms and rotations of queries and keys in few passes: the numbers and gradients of the operations one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tarflow.flows.layers import heads as module
from tarflow.flows.layers.config import TransformerConfig
from tarflow.flows.layers.heads import by_operations, norm_functions, turned_heads
from tarflow.flows.layers.positions import rotation_tables
from tarflow.flows.layers.transformer import Attention

B, S, H, K, D = 3, 5, 4, 2, 8


def inputs(dtype: torch.dtype, norms: bool, rotation: bool) -> tuple[Tensor, Any, Any]:
    torch.manual_seed(0)
    qkv = torch.randn(B, S, H + 2 * K, D, dtype=dtype, requires_grad=True)
    tables = rotation_tables(torch.randn(S, D // 2, dtype=torch.promote_types(dtype, torch.float32)))
    weights = (torch.randn(D, dtype=tables[0].dtype, requires_grad=True) for _ in range(2))
    return qkv, (*weights, 1e-3) if norms else None, tables if rotation else None


def gradients(made: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(made, wanted, [torch.randn(each.shape, dtype=each.dtype) for each in made]))


@pytest.mark.parametrize(("norms", "rotation"), itertools.product([True, False], repeat=2))
@pytest.mark.parametrize("piece", [1, 2 * S * (H + K) * D, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int, norms: bool, rotation: bool
) -> None:
    """Sample by sample, in two unequal pieces, and in one."""
    monkeypatch.setattr(module, "PIECE", piece)
    qkv, weights, tables = inputs(dtype, norms, rotation)
    wanted = [qkv, *(weights or ())[:2]]
    functions = norm_functions(*weights) if weights else None
    expected, found = by_operations(qkv, H, K, functions, tables), turned_heads(qkv, H, K, weights, tables)
    assert [each.shape for each in found] == [(B, H, S, D), (B, K, S, D), (B, K, S, D)]
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]
    for ours, exact in zip((*found, *gradients(found, wanted)), (*expected, *gradients(expected, wanted)), strict=True):
        assert ours.dtype == exact.dtype
        size = max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(ours, exact, rtol=rounding, atol=rounding * size)


@pytest.mark.parametrize(("norms", "rotation"), [(True, True), (True, False), (False, True)])
def test_gradients_of_gradients(norms: bool, rotation: bool) -> None:
    qkv, weights, tables = inputs(torch.float64, norms, rotation)
    qkv = qkv.detach()[:1, :2].requires_grad_()
    tables = tuple(table[:2] for table in tables) if rotation else None
    wanted = (qkv, *(weights or ())[:2])

    def made(qkv: Tensor, *weights: Tensor) -> Any:
        return turned_heads(qkv, H, K, (weights[0], weights[1], 1e-3) if weights else None, tables)

    assert torch.autograd.gradcheck(made, wanted)
    assert torch.autograd.gradgradcheck(made, wanted)


@pytest.mark.parametrize(("norms", "rotation"), [(True, True), (False, True)])
def test_transforms_of_functions(norms: bool, rotation: bool) -> None:
    """Jacobians row by row, by many rows at once, by `torch.func` and by forward-mode derivatives."""
    qkv, weights, tables = inputs(torch.float64, norms, rotation)
    x = qkv.detach()[:1, :2]
    tables = tuple(table[:2] for table in tables)

    def made(x: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in turned_heads(x, H, K, weights, tables)])

    expected = torch.autograd.functional.jacobian(made, x)
    for found in (
        torch.autograd.functional.jacobian(made, x, vectorize=True),
        torch.autograd.functional.jacobian(made, x, vectorize=True, strategy="forward-mode"),
        torch.func.jacrev(made)(x),
        torch.func.jacfwd(made)(x),
    ):
        torch.testing.assert_close(found.flatten(1), expected.flatten(1), rtol=1e-12, atol=1e-12)


def test_weights_alone_and_the_product_alone() -> None:
    """As where only adapters learn, or nothing before the norms does."""
    qkv, weights, tables = inputs(torch.float64, True, True)
    whole = gradients(turned_heads(qkv, H, K, weights, tables), [qkv, *weights[:2]])
    fixed = (weights[0].detach(), weights[1].detach(), weights[2])
    alone = gradients(turned_heads(qkv, H, K, fixed, tables), [qkv])
    alone += gradients(turned_heads(qkv.detach(), H, K, weights, tables)[:2], list(weights[:2]))
    for ours, exact in zip(alone, whole, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_rotating_keeps_only_its_tables() -> None:
    qkv, _, tables = inputs(torch.float32, False, True)
    kept: list[tuple[int, ...]] = []

    def keep(each: Tensor) -> Tensor:
        kept.append(tuple(each.shape))
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        turned_heads(qkv, H, K, None, tables)
    assert kept == [(S, D), (S, D)]


def test_hooks_of_norms_are_called() -> None:
    """Those of a norm itself, and those on all modules."""
    attention = Attention(TransformerConfig(width=32, layers=1, head_dim=8, num_heads=4, num_kv_heads=4, qk_norm=True))
    x = torch.randn(2, S, 32)
    expected = attention(x)
    calls: list[Any] = []
    assert attention.query_norm is not None and attention.key_norm is not None
    handle = attention.key_norm.register_forward_hook(lambda *call: calls.append(call[0]))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)
    assert calls == [attention.key_norm]
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *call: calls.append(call[0]))
    try:
        attention(x)
    finally:
        everywhere.remove()
    assert attention.query_norm in calls[1:] and attention.key_norm in calls[1:]


def test_compilers_get_operations() -> None:
    torch.compiler.reset()
    qkv, weights, tables = inputs(torch.float32, True, True)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    found = torch.compile(turned_heads, backend=backend, fullgraph=True)(qkv, H, K, weights, tables)
    for ours, exact in zip(found, turned_heads(qkv, H, K, weights, tables), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and "TurnedHeads" not in graphs[0].code
