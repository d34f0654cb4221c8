"""What one flow block is made of, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from tarflow.flows.layers.affine import SCALES
from tarflow.flows.layers.groups import GROUPS
from tarflow.flows.layers.order import ORDERS
from tarflow.flows.layers.positions import TEXT_FREQUENCIES

CONDITIONINGS = ("none", "class_vectors", "class_prefix", "prefix")
DENOISERS = ("none", "unconditional", "conditional")
MIXINGS = ("none", "lu")
POSITIONS = ("learned", "rotary", "rotary_1d")
CHOICES = {
    "mlp": ("gelu", "geglu"),
    "norm": ("layer_norm", "rms_norm"),
    "scale": SCALES,
    "positions": POSITIONS,
    "conditioning": CONDITIONINGS,
    "order": ORDERS,
    "groups": GROUPS,
    "mixing": MIXINGS,
}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings of one block; those that `TARFlowModel` has too mean the same there.

    ``conditioning`` is "none" for a block that does not see the condition; ``text_axis`` says whether rotary positions
    keep room for a prefix, which they do in all blocks of a model with one. ``causal`` is False for the denoiser and
    for coupling blocks, whose tokens stay in row-major order; ``swapped`` says which of their groups is seen.
    """

    token_dim: int
    grid_size: int
    layers: int
    width: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_ratio: int
    mlp: str
    norm: str
    final_norm: bool
    qk_norm: bool
    post_norm: bool
    bias: bool
    start_token: bool
    scale: str
    soft_clip: float
    positions: str
    position_length: int
    text_axis: bool
    conditioning: str
    num_classes: int
    cond_dim: int
    order: str
    causal: bool
    groups: str
    swapped: bool
    mixing: str
    actnorm: bool

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("layers", "width", "head_dim", "num_heads", "num_kv_heads", "mlp_ratio", "position_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.soft_clip < 0:
            raise ValueError(f"soft_clip must be 0 (off) or positive, got {self.soft_clip}")
        spatial = self.head_dim // 2 - (TEXT_FREQUENCIES if self.text_axis else 0)
        if self.positions == "rotary" and (self.head_dim % 2 or spatial < 2 or spatial % 2):
            room = f", of which {TEXT_FREQUENCIES} of head_dim / 2 pairs are for the prefix" if self.text_axis else ""
            raise ValueError(f"head_dim {self.head_dim} does not fit rotary positions on two axes{room}; try 32 or 64")
        if self.positions == "rotary_1d" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
