"""What a block and its Transformer are made of, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tarflow.flows.layers.affine import SCALES
from tarflow.flows.layers.groups import GROUPS
from tarflow.flows.layers.order import ORDERS
from tarflow.flows.layers.positions import TEXT_FREQUENCIES

CONDITIONINGS = ("none", "class_vectors", "class_prefix", "prefix")
DENOISERS = ("none", "unconditional", "conditional")
MIXINGS = ("none", "lu")
POSITIONS = ("learned", "rotary", "rotary_1d")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What the Transformer layers of a network are made of; settings that `TARFlowModel` has too mean the same there.

    ``layers`` is how many; ``causal`` says whether a slot sees only those before it.
    """

    layers: int
    width: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    mlp: str = "gelu"
    mlp_ratio: int = 4
    norm: str = "layer_norm"
    qk_norm: bool = False
    post_norm: bool = False
    bias: bool = True
    causal: bool = True

    def __post_init__(self) -> None:
        check_choices(self, {"mlp": ("gelu", "geglu"), "norm": ("layer_norm", "rms_norm")})
        check_at_least_one(self, ("layers", "width", "head_dim", "num_heads", "num_kv_heads", "mlp_ratio"))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings of one network over an image's tokens; those that `TARFlowModel` has too mean the same there.

    ``conditioning`` is "none" for a block that does not see the condition; ``text_axis`` says whether rotary positions
    keep room for a prefix, which they do in all blocks of a model with one. The tokens of coupling blocks stay in row-major
    order; ``swapped`` says which of their groups is seen.
    """

    transformer: TransformerConfig
    token_dim: int
    grid_size: int
    final_norm: bool
    start_token: bool
    scale: str
    soft_clip: float
    positions: str
    position_length: int
    text_axis: bool
    conditioning: str
    num_classes: int
    cond_dim: int
    noise_conditioning: bool
    order: str
    groups: str
    swapped: bool
    mixing: str
    actnorm: bool

    def __post_init__(self) -> None:
        choices = {"scale": SCALES, "positions": POSITIONS, "conditioning": CONDITIONINGS}
        check_choices(self, choices | {"order": ORDERS, "groups": GROUPS, "mixing": MIXINGS})
        check_at_least_one(self, ("position_length",))
        if self.soft_clip < 0:
            raise ValueError(f"soft_clip must be 0 (off) or positive, got {self.soft_clip}")
        check_head_dim(self.transformer.head_dim, self.positions, self.text_axis)


def check_choices(config: object, choices: Mapping[str, Sequence[str]]) -> None:
    """An error for the first setting that is none of its choices."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}")


def check_at_least_one(config: object, names: Sequence[str]) -> None:
    """An error for the first setting of these that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_head_dim(head_dim: int, positions: str, text_axis: bool) -> None:
    """An error for a head whose pairs of numbers rotary positions cannot share out among their axes."""
    spatial = head_dim // 2 - (TEXT_FREQUENCIES if text_axis else 0)
    if positions == "rotary" and (head_dim % 2 or spatial < 2 or spatial % 2):
        room = f", of which {TEXT_FREQUENCIES} of head_dim / 2 pairs are for the prefix" if text_axis else ""
        raise ValueError(f"head_dim {head_dim} does not fit rotary positions on two axes{room}; try 32 or 64")
    if positions == "rotary_1d" and head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
