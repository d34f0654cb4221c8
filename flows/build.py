"""The parts of a `TARFlowModel` from its arguments, and errors of arguments that do not fit together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.blocks.coupling import CouplingBlock
from tarflow.flows.blocks.inverse_autoregressive import InverseAutoregressiveBlock
from tarflow.flows.denoiser import Denoiser
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.config import CONDITIONINGS, DENOISERS, BlockConfig, TransformerConfig
from tarflow.flows.layers.module_list import ModuleList
from tarflow.flows.layers.order import PATCH_LAYOUTS, block_order
from tarflow.flows.layers.scattered import SCATTERED

BLOCKS: dict[str, type[FlowBlock]] = {
    "autoregressive": FlowBlock,
    "coupling": CouplingBlock,
    "inverse_autoregressive": InverseAutoregressiveBlock,
}


def check_model(config: Any) -> None:
    """Errors of a model's arguments that no single block can see; ``config`` is a `TARFlowModel`'s."""
    layers, conditioning = config.layers_per_block, config.conditioning
    if not layers or layers[-1] < 1 or min(layers) < 0:
        raise ValueError(
            f"layers_per_block must list at least one block, none negative, the last one with layers; "
            f"got {list(layers)}"
        )
    if config.patch_size < 1 or config.sample_size < 1 or config.sample_size % config.patch_size:
        raise ValueError(
            f"sample_size ({config.sample_size}) must be a positive multiple of patch_size ({config.patch_size})"
        )
    for name, choices in (
        ("patch_layout", PATCH_LAYOUTS),
        ("conditioning", CONDITIONINGS),
        ("learned_denoiser", DENOISERS),
        ("block", tuple(BLOCKS)),
    ):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
    check_deep_order(config)
    if config.condition_blocks not in ("all", "deep"):
        raise ValueError(f"condition_blocks must be 'all' or 'deep', got {config.condition_blocks!r}")
    if config.learned_denoiser == "conditional" and conditioning == "none":
        raise ValueError("learned_denoiser is 'conditional', but conditioning is 'none'")
    if config.noise_conditioning and config.learned_denoiser != "none":
        raise ValueError(
            f"learned_denoiser is {config.learned_denoiser!r}, but with noise_conditioning noise is removed level by level "
            "by the flow's own score: set learned_denoiser to 'none'"
        )
    if config.block != "coupling" and (config.mixing != "none" or config.actnorm):
        raise ValueError(f"mixing and actnorm are for block 'coupling', not {config.block!r}")
    if conditioning.startswith("class") and config.num_classes < 1:
        raise ValueError(f"conditioning {conditioning!r} needs num_classes of at least 1, got {config.num_classes}")
    if conditioning == "prefix" and config.cond_dim < 1:
        raise ValueError(f"conditioning 'prefix' needs cond_dim of at least 1, got {config.cond_dim}")


def check_deep_order(config: Any) -> None:
    """Errors of a model's ``deep_order``."""
    if config.deep_order is None:
        return
    if config.deep_order not in SCATTERED:
        raise ValueError(f"deep_order must be one of {', '.join(SCATTERED)}, or left out, got {config.deep_order!r}")
    if config.block != "autoregressive" or not config.start_token:
        raise ValueError(
            f"deep_order is for block 'autoregressive' with a start_token, got {config.block!r} and {config.start_token}: "
            "leave it out"
        )
    if config.positions == "rotary_1d":
        raise ValueError(
            "deep_order goes over rows and columns, which positions 'rotary_1d' do not know: take 'rotary'"
        )


def network_config(model: Any, layers: int, width: int, sees_condition: bool, order: str) -> BlockConfig:
    """Settings of one network of a model.

    Args:
        model: the model's arguments.
        layers, width: of its Transformer.
        sees_condition: whether it does.
        order: that the tokens have, or for a coupling block which of its groups is seen.
    """
    for name, value in (("head_dim", model.head_dim), ("num_heads", model.num_heads), ("width", width)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if model.num_heads is None and width % model.head_dim:
        raise ValueError(f"head_dim {model.head_dim} does not divide the width {width}; set num_heads, or other")
    heads, grid_size = model.num_heads or width // model.head_dim, model.sample_size // model.patch_size
    coupling = model.block == "coupling"
    transformer = TransformerConfig(
        layers=layers,
        width=width,
        head_dim=model.head_dim,
        num_heads=heads,
        num_kv_heads=model.num_kv_heads or heads,
        mlp_ratio=model.mlp_ratio,
        mlp=model.mlp,
        norm=model.norm,
        qk_norm=model.qk_norm,
        post_norm=model.post_norm,
        bias=model.bias,
        causal=not coupling,
    )
    return BlockConfig(
        transformer=transformer,
        token_dim=model.in_channels * model.patch_size**2,
        grid_size=grid_size,
        final_norm=model.final_norm,
        start_token=model.start_token,
        scale=model.scale,
        soft_clip=model.soft_clip,
        positions=model.positions,
        position_length=model.position_length or grid_size,
        text_axis=model.conditioning in ("class_prefix", "prefix"),
        conditioning=model.conditioning if sees_condition else "none",
        num_classes=model.num_classes,
        cond_dim=model.num_classes + 1 if model.conditioning == "class_prefix" else model.cond_dim,
        noise_conditioning=model.noise_conditioning,
        order="row_major" if coupling else order,
        groups=model.groups,
        swapped=coupling and order == "reversed",
        mixing=model.mixing,
        actnorm=model.actnorm,
    )


def make_blocks(model: Any) -> ModuleList[Block]:
    """The blocks from the data to the noise."""
    blocks: ModuleList[Block] = ModuleList()
    last = len(model.layers_per_block) - 1
    for index, layers in enumerate(model.layers_per_block):
        if layers > 0:
            width = model.deep_width if index == last and model.deep_width else model.width
            sees = model.condition_blocks == "all" or index == last
            order = block_order(index, model.first_order)
            config = network_config(model, layers, width, sees, (index == last and model.deep_order) or order)
            blocks.append(BLOCKS[model.block](config))
    return blocks


def make_denoiser(model: Any) -> Denoiser | None:
    """The network that predicts the score, if there is one."""
    if model.learned_denoiser == "none":
        return None
    conditional = model.learned_denoiser == "conditional"
    config = network_config(model, model.denoiser_layers, model.width, conditional, "row_major")
    config = replace(config, transformer=replace(config.transformer, causal=False), final_norm=True)
    return Denoiser(config, outputs=config.token_dim)
