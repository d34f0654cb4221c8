"""Settings of training a LoRA adapter of a pipeline instead of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tarflow.common.checks import BelowOne, OffOrPositive, Positive, check, check_ranges
from tarflow.flows.adapters.targets import LORA_TARGETS
from tarflow.training.loop.config import without_muon

if TYPE_CHECKING:
    from tarflow.training.flow.config import RunConfig

#: Layers of the small text encoder, a T5, that get an adapter: those of attention.
TEXT_TARGETS = ("q", "k", "v", "o")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter of the flow of ``init_from``, whose own weights stay as they are.

    Attributes:
        rank: of the change of each layer's weight; 0 trains all weights instead.
        alpha: the change is multiplied by alpha / rank; None is the rank, a factor of 1.
        dropout: share of a layer's inputs that its adapter does not see, in training.
        target_modules: names of the flow's linear layers that get one: qkv, proj, up, down, proj_in, proj_out, proj_cond.
        text_encoder: also one of the small text encoder.
    """

    rank: OffOrPositive = 0
    alpha: Positive | None = None
    dropout: BelowOne = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    text_encoder: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "lora")
        check(bool(self.target_modules), "lora.target_modules is empty: name the layers that get an adapter")
        for name, default in (("alpha", None), ("dropout", 0.0), ("text_encoder", False)):
            value = getattr(self, name)
            check(self.rank > 0 or value == default, f"lora.{name} is {value}, but lora.rank is 0, which is off")


def check_lora(config: RunConfig) -> None:
    """Whether a run's settings allow an adapter; ``config`` is a `RunConfig`."""
    if config.lora.rank == 0:
        return
    check(
        config.init_from is not None,
        f"lora.rank is {config.lora.rank}, but an adapter is of a pipeline: name it, --init_from emoji or a folder",
    )
    check(
        config.vae.train != "joint",
        "lora.rank and vae.train 'joint' do not go together: an adapter leaves all else as it is",
    )
    check(
        config.optim.name == "adamw",
        f"optim.name is {config.optim.name!r}, which is for whole matrices, but lora.rank {config.lora.rank} trains an "
        f"adapter: set {', '.join(['optim.name adamw', *without_muon(config.optim, 'optim.')])}",
    )
    check(
        config.train.checkpointing != "reversible" or config.lora.dropout == 0,
        "lora.dropout cannot be drawn again as train.checkpointing 'reversible' would have to: set one of them to 0 or 'none'",
    )
    check(
        not config.lora.text_encoder or config.text.kind == "small",
        f"lora.text_encoder is for text.kind 'small', but text.kind is {config.text.kind!r}",
    )
