"""Muon for hidden matrices, AdamW for all else, as one optimizer.

Muon takes the momentum of a matrix's gradient to the nearest matrix with orthonormal rows or columns and steps along
that (Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024). The size of the step matches that
of AdamW, 0.2·√max(rows, columns) times the learning rate (*Muon is Scalable for LLM Training*, arXiv:2502.16982), so
that both may have one rate. `torch.optim.Muon` has the same numbers; here all matrices of one shape are one product,
and long ones are iterated by their smaller Gram matrix, which halves the time that small models need for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

#: Of the quintic iteration X ← aX + bXXᵀX + c(XXᵀ)²X, chosen by Jordan for a steep slope at 0; five times are enough.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
#: From this ratio of columns to rows on, iterating the Gram matrix takes fewer operations. It has the squares of the
#: singular values, so it is made anew after some iterations, before bfloat16's rounding grows.
GRAM_RATIO, RESTART = 1.5, 2


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``muon: True`` are stepped by Muon instead.

    Args:
        groups: of parameters. One with ``muon: True`` has matrices only, and kernels of convolutions, whose input
            dimensions are one; its key ``pieces`` says of how many matrices of equal size, one above the other, each of
            its parameters is made (1 unless given).
        lr, weight_decay: of groups without their own.
        betas: of AdamW.
        momentum: of Muon, with Nesterov's look ahead.

    Raises:
        ValueError: for a parameter in a group of Muon that is no matrix, or cannot be divided so.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1e-4,
        momentum: float = 0.95,
    ):
        groups = [{"muon": False, "momentum": momentum, **group} for group in groups]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        # A gradient scaler must leave out steps that are not finite itself: only AdamW's kernel sees its flag.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group.setdefault("pieces", [1] * len(group["params"]))
            for weight, pieces in zip(group["params"], group["pieces"], strict=True) if group["muon"] else ():
                if weight.ndim < 2 or weight.shape[0] % pieces:
                    raise ValueError(f"{pieces} matrices for Muon cannot be made of a tensor {tuple(weight.shape)}")

    #: A number on the device, or None: 1 leaves everything as it is, as fused AdamW takes it, 0 takes the step.
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all groups; a closure is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        self.step_matrices([group for group in groups if group["muon"]])

    def step_matrices(self, groups: Sequence[dict[str, Any]]) -> None:
        """Muon's step: momentum, then one iteration for all matrices of a shape, then the weights."""
        stacks: dict[tuple[int, int], list[tuple[Tensor, dict[str, Any], Tensor]]] = defaultdict(list)
        for group in groups:
            found = [
                (w, pieces) for w, pieces in zip(group["params"], group["pieces"], strict=True) if w.grad is not None
            ]
            if self.found_inf is not None and found:
                updates = self.looked_ahead_unless(self.found_inf, [weight for weight, _ in found], group["momentum"])
            else:
                updates = [self.looked_ahead(weight, group["momentum"]) for weight, _ in found]
            for (weight, pieces), update in zip(found, updates, strict=True):
                update = update.reshape(pieces, weight.shape[0] // pieces, -1).to(fast_dtype(update.device))
                rows, columns = update.shape[1:]
                stacks[min(rows, columns), max(rows, columns)].append((weight, group, update))
        for entries in stacks.values():
            lying = [update if update.shape[1] <= update.shape[2] else update.mT for _, _, update in entries]
            stack = orthogonalised(torch.cat(lying))
            if self.found_inf is not None:
                stack = stack * (1 - self.found_inf).to(stack.dtype)
            parts = stack.split([len(part) for part in lying])
            for (weight, group, update), part in zip(entries, parts, strict=True):
                change(weight, part if update.shape[1] <= update.shape[2] else part.mT, group, self.found_inf)

    def looked_ahead_unless(self, found_inf: Tensor, weights: Sequence[nn.Parameter], momentum: float) -> list[Tensor]:
        """As `looked_ahead` of each; where ``found_inf`` is 1 the momentum stays as it is, and what is returned is finite."""
        buffers = []
        for weight in weights:
            self.prepare_state(weight)
            buffers.append(self.state[weight]["momentum_buffer"])
        gradients = [weight.grad.masked_fill(found_inf > 0, 0) for weight in weights if weight.grad is not None]
        torch._foreach_mul_(buffers, torch.where(found_inf > 0, 1.0, momentum))
        torch._foreach_add_(buffers, gradients, alpha=1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))

    def prepare_state(self, weight: nn.Parameter) -> None:
        if not self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            self.state[weight]["step"] = torch.zeros(())  # which AdamW wants to find of every parameter

    def looked_ahead(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum, whole where processes share it."""
        gradient = weight.grad
        assert gradient is not None
        self.prepare_state(weight)
        state = self.state[weight]
        update = gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)
        return update.full_tensor() if isinstance(update, DTensor) else update


def change(weight: Tensor, orthogonal: Tensor, group: dict[str, Any], found_inf: Tensor | None = None) -> None:
    """Decay a weight, unless ``found_inf`` is 1, and step along its update (pieces, rows, columns)."""
    size = 0.2 * max(orthogonal.shape[1:]) ** 0.5
    update = orthogonal.reshape(weight.shape).to(weight.dtype)
    if isinstance(weight, DTensor):  # each process has the whole update, and takes its share
        update = distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)
    decay = group["lr"] * group["weight_decay"]
    weight.mul_(1 - decay if found_inf is None else 1 - decay * (1 - found_inf))
    weight.add_(update, alpha=-group["lr"] * size)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix's polar decomposition: singular values become 0.7 to 1.2.

    Args:
        matrices: (N, m, n) with m ≤ n.

    Returns:
        (N, m, n), computed in the dtype of the matrices.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_min(1e-7)
    x = matrices / norms.to(matrices.dtype)
    if x.shape[2] < GRAM_RATIO * x.shape[1]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, quadratic(gram), x, beta=COEFFICIENTS[0])
        return x
    for iterations in (RESTART, ITERATIONS - RESTART):
        x = product_of_factors(x @ x.mT, iterations) @ x
    return x


def product_of_factors(gram: Tensor, iterations: int) -> Tensor:
    """The product Q of the iterations' factors P = aI + bG + cG², so that QX is the last iterate of X; G = XXᵀ becomes
    PGP. All of them are polynomials of the first G and commute.

    Args:
        gram: (N, m, m), symmetric.
    """
    product = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for iteration in range(iterations):
        factor = quadratic(gram)
        factor.diagonal(dim1=1, dim2=2).add_(COEFFICIENTS[0])
        product = factor if iteration == 0 else factor @ product
        if iteration < iterations - 1:
            gram = factor @ gram @ factor
    return product


def quadratic(gram: Tensor) -> Tensor:
    """bG + cG² of matrices (N, m, m)."""
    return torch.baddbmm(gram, gram, gram, beta=COEFFICIENTS[1], alpha=COEFFICIENTS[2])


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """What the iteration computes in: it forgives rounding, so bfloat16 wherever a device multiplies it fast."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16
