"""Classifier-free guidance of a flow block's affine parameters.

Weights are w = guidance_scale − 1: w = 0 is plain conditional sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

GuidanceMethod = Literal["gaussian", "linear", "linear_scale"]
METHODS: tuple[GuidanceMethod, ...] = get_args(GuidanceMethod)
#: Of "linear_scale": a guided scale is at least this share of the conditional one. Where the unconditional scale is much
#: larger, the line would go below 0.
SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class Guidance:
    """How a guided block combines its conditional and unconditional parameters.

    Attributes:
        weight: w ≥ 0; one for each sample, (B, 1, 1), where a flow maps data to noise (see `guided_states`).
        method: "gaussian" (STARFlow's closed form), "linear" (TARFlow's), or "linear_scale" (iTARFlow's, linear in the
            scale instead of its logarithm).
        parts: which parameters a linear form changes: "a" the log-scale, "b" the shift, "ab" both.
        annealed: a linear form's weight grows with the token's place in the block's order.
        temperature: of the attention in the second pass; 1 is ordinary.
        blocks: which are guided: "all", or "deep", the one next to the noise alone (iTARFlow).
    """

    weight: float | Tensor
    method: str = "gaussian"
    parts: str = "ab"
    annealed: bool = False
    temperature: float = 1.0
    blocks: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor) and not self.weight >= 0:
            raise ValueError(
                f"the guidance weight must be 0 or positive (guidance_scale at least 1), got {self.weight}"
            )
        if self.method not in METHODS:
            raise ValueError(f"the guidance method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.parts not in ("a", "b", "ab"):
            raise ValueError(f"the guided parts must be 'a', 'b' or 'ab', got {self.parts!r}")
        if self.method == "gaussian" and (self.parts != "ab" or self.annealed):
            what = f"the guided parts {self.parts!r}" if self.parts != "ab" else "annealed guidance"
            raise ValueError(
                f"{what} would have no effect with the guidance method 'gaussian': take guidance_method 'linear' or "
                "'linear_scale', or leave it out"
            )
        if self.blocks not in ("all", "deep"):
            raise ValueError(f"the guided blocks must be 'all' or 'deep', got {self.blocks!r}")
        if not self.temperature > 0:
            raise ValueError(f"the attention temperature must be positive, got {self.temperature}")

    @property
    def active(self) -> bool:
        """Whether there is any guidance."""
        return isinstance(self.weight, Tensor) or self.weight > 0

    def of_block(self, deep: bool) -> Guidance | None:
        """What a block is guided by; ``deep`` if it is the one next to the noise."""
        return self if deep or self.blocks == "all" else None

    def __call__(
        self, cond: tuple[Tensor, Tensor], uncond: tuple[Tensor, Tensor], token: int | Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Guided (shift, log_scale), each (B, …, C); ``token`` is the place in the block's order, one or (S, 1)."""
        if self.method == "gaussian":
            return guide_gaussian(cond, uncond, self.weight)
        weight = self.weight * token / max(num_tokens - 1, 1) if self.annealed else self.weight
        guide = guide_linear if self.method == "linear" else guide_linear_scale
        return guide(cond, uncond, weight, self.parts)


def guide_gaussian(
    cond: tuple[Tensor, Tensor], uncond: tuple[Tensor, Tensor], weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The Gaussian proportional to N_c^(1+w) / N_u^w, with the variance ratio clipped at 1 (STARFlow, closed form).

    s = min(1, σc/σu)², σ = σc/√(1 + w − w·s), μ = ((1 + w)·μc − w·s·μu)/(1 + w − w·s), per element.
    """
    (shift_c, log_scale_c), (shift_u, log_scale_u) = cond, uncond
    weighted = (log_scale_c - log_scale_u).clamp(max=0.0).mul(2).exp() * weight  # w·s
    denominator = 1 + weight - weighted
    shift = torch.addcmul((1 + weight) * shift_c, weighted, shift_u, value=-1) / denominator
    return shift, torch.sub(log_scale_c, denominator.log(), alpha=0.5)


def guide_linear(
    cond: tuple[Tensor, Tensor], uncond: tuple[Tensor, Tensor], weight: float | Tensor, parts: str = "ab"
) -> tuple[Tensor, Tensor]:
    """p + w·(p − p_u) for the log-scale ("a"), the shift ("b") or both (TARFlow)."""
    (shift, log_scale), (shift_u, log_scale_u) = cond, uncond
    if "b" in parts:
        shift = shift + weight * (shift - shift_u)
    if "a" in parts:
        log_scale = log_scale + weight * (log_scale - log_scale_u)
    return shift, log_scale


def guide_linear_scale(
    cond: tuple[Tensor, Tensor], uncond: tuple[Tensor, Tensor], weight: float | Tensor, parts: str = "ab"
) -> tuple[Tensor, Tensor]:
    """As `guide_linear`, but σ + w·(σ − σ_u) for the scale ("a") itself (iTARFlow)."""
    log_scale = cond[1]
    guided, _ = guide_linear(cond, uncond, weight, parts.replace("a", ""))
    if "a" in parts:
        ratio = 1 + weight * (1 - (uncond[1] - log_scale).exp())  # of the guided scale to σ
        log_scale = log_scale + ratio.clamp(min=SMALLEST_SHARE).log()
    return guided, log_scale
