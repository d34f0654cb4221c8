"""Weights of the published TARFlow, STARFlow and iTARFlow models as those of a `TARFlowModel`.

``config`` always means the arguments of the published model class, by their published names. Only names and shapes
change; no number does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.model import TARFlowModel

TARFLOW_KEYS = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block")
TARFLOW_OPTIONS = ("nvp", "num_classes", "head_dim")
#: iTARFlow's, where a list has one value for all blocks or one for each.
ITARFLOW_KEYS = ("in_channels", "img_size", "patch_sizes", "channels", "num_blocks", "layers_per_block")
ITARFLOW_OPTIONS = (*TARFLOW_OPTIONS, "shared_backbone_layers")
STARFLOW_KEYS = (*TARFLOW_KEYS, "rope", "sos", "txt_size", "txt_dim", "seq_order")
STARFLOW_OPTIONS = (
    "nvp",
    "head_dim",
    "num_heads",
    "num_kv_heads",
    "cond_top_only",
    "use_softplus",
    "use_final_norm",
    "soft_clip",
    "norm_type",
    "use_bias",
    "use_qk_norm",
    "use_post_norm",
    "use_swiglu",
    "top_block_channels",
    "pt_seq_len",
    "learnable_self_denoiser",
    "conditional_denoiser",
)

#: Published names of what is inside one Transformer layer, and ours.
LAYER_NAMES = {"mlp.main.0": "mlp.up", "mlp.main.2": "mlp.down", "mlp.down_proj": "mlp.down"}
BLOCK_NAMES = {"proj_txt": "proj_cond", "sos_embed": "start_token"}
LEVEL_NAMES = {"time_embed.mlp.0": "level_embed.up", "time_embed.mlp.2": "level_embed.down"}
#: Published names of a block's Transformer layers; iTARFlow has had both.
LAYER_LISTS = ("attn_blocks.", "head_blocks.")
#: Saved by the published code, but computed anew here.
LEFT_OVERS = ("attn_mask", "freqs_cos", "freqs_sin")
#: Published names of the parts beside the blocks.
PARTS = {"learnable_self_denoiser": "denoiser"}
DENOISER_LAYERS = 8  # fixed in the published code


def is_starflow(config: dict[str, Any]) -> bool:
    """Whether the arguments are STARFlow's; TARFlow's model class knows no text."""
    return "txt_size" in config


def is_itarflow(config: dict[str, Any]) -> bool:
    """Whether the arguments are iTARFlow's; the others have one patch size, by another name."""
    return "patch_sizes" in config or "shared_backbone_layers" in config


def family_of(config: dict[str, Any]) -> str:
    """The published model class whose arguments these are: "tarflow", "starflow" or "itarflow"."""
    if is_itarflow(config):
        return "itarflow"
    return "starflow" if is_starflow(config) else "tarflow"


def model_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `TARFlowModel` that equals the published model, of whichever family."""
    makers = {"tarflow": tarflow_arguments, "starflow": starflow_arguments, "itarflow": itarflow_arguments}
    return makers[family_of(config)](config)


def tarflow_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `TARFlowModel` that equals a published TARFlow model.

    Raises:
        ValueError: if an argument is missing or unknown.
    """
    check_keys(config, TARFLOW_KEYS, TARFLOW_OPTIONS)
    volume_preserving = not config.get("nvp", True)
    num_classes = config.get("num_classes") or 0
    return {
        **common_arguments(config),
        "patch_layout": "channel_first",
        "final_norm": False,
        "start_token": False,
        "scale": "additive" if volume_preserving else "exp",
        "soft_clip": 0.0,
        "positions": "learned",
        "conditioning": "class_vectors" if num_classes else "none",
        "num_classes": num_classes,
        "first_order": "row_major",
        "learned_prior": volume_preserving,
    }


def itarflow_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `TARFlowModel` that equals a published iTARFlow model: a TARFlow that knows the noise level.

    Raises:
        ValueError: if an argument is missing or unknown, or for what the published code has and no published model:
            layers that all blocks share, and blocks of several patch sizes, or of several widths beside the last one's.
    """
    check_keys(config, ITARFLOW_KEYS, ITARFLOW_OPTIONS)
    if shared := config.get("shared_backbone_layers") or 0:
        raise ValueError(
            f"the config has shared_backbone_layers {shared}: layers that all blocks share are not implemented here"
        )
    blocks = config["num_blocks"]
    patches, widths = one_for_each(config, "patch_sizes", blocks), one_for_each(config, "channels", blocks)
    if len(set(patches)) > 1:
        raise ValueError(
            f"the config has patch_sizes {list(patches)}: blocks of several patch sizes are not implemented here"
        )
    if len(set(widths[:-1])) > 1:
        raise ValueError(
            f"the config has channels {list(widths)}: only the last block may have a width of its own here"
        )
    alike = {key: value for key, value in config.items() if key in (*TARFLOW_KEYS, *TARFLOW_OPTIONS)}
    layers = one_for_each(config, "layers_per_block", blocks)
    arguments = tarflow_arguments(
        {**alike, "patch_size": patches[0], "channels": widths[0], "layers_per_block": list(layers)}
    )
    deep_width = widths[-1] if widths[-1] != widths[0] else None
    return {**arguments, "deep_width": deep_width, "noise_conditioning": True}


def one_for_each(config: dict[str, Any], key: str, blocks: int) -> tuple[int, ...]:
    """A setting of each block, from one for all (a number, or a list of one) or a list."""
    value = config[key]
    values = (value,) if isinstance(value, int) else tuple(value)
    values = values * blocks if len(values) == 1 else values
    if len(values) != blocks or not values:
        raise ValueError(f"{key} lists {len(values)} blocks, but num_blocks is {blocks}")
    return values


def starflow_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `TARFlowModel` that equals a published STARFlow model.

    A condition of one token is a class label: ``txt_dim`` counts the classes and "no class".

    Raises:
        ValueError: if an argument is missing or unknown.
    """
    check_keys(config, STARFLOW_KEYS, STARFLOW_OPTIONS)
    if config["seq_order"] not in ("R2L", "L2R"):
        raise ValueError(f"seq_order must be 'R2L' or 'L2R', got {config['seq_order']!r}")
    conditioning = {0: "none", 1: "class_prefix"}.get(config["txt_size"], "prefix")
    scale = "softplus" if config.get("use_softplus") else "exp"
    denoiser = "conditional" if config.get("conditional_denoiser") else "unconditional"
    return {
        **common_arguments(config),
        "patch_layout": "channel_last",
        "deep_width": config.get("top_block_channels") or None,
        "num_heads": config.get("num_heads") or None,
        "num_kv_heads": config.get("num_kv_heads") or None,
        "mlp": "geglu" if config.get("use_swiglu") else "gelu",  # published under this name, but the gate is a GELU
        "norm": config.get("norm_type", "layer_norm"),
        "final_norm": bool(config.get("use_final_norm", False)),
        "qk_norm": bool(config.get("use_qk_norm", False)),
        "post_norm": bool(config.get("use_post_norm", False)),
        "bias": bool(config.get("use_bias", True)),
        "start_token": bool(config["sos"]),
        "scale": scale if config.get("nvp", True) else "additive",
        "soft_clip": float(config.get("soft_clip", 0)),
        "positions": "rotary" if config["rope"] else "learned",
        "position_length": config.get("pt_seq_len") or None,
        "conditioning": conditioning,
        "condition_blocks": "deep" if config.get("cond_top_only") else "all",
        "num_classes": config["txt_dim"] - 1 if conditioning == "class_prefix" else 0,
        "cond_dim": config["txt_dim"] if conditioning == "prefix" else 0,
        "first_order": "row_major" if config["seq_order"] == "R2L" else "reversed",
        "learned_denoiser": denoiser if config.get("learnable_self_denoiser") else "none",
        "denoiser_layers": DENOISER_LAYERS,
    }


def common_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What both families call by the same names."""
    return {
        "in_channels": config["in_channels"],
        "sample_size": config["img_size"],
        "patch_size": config["patch_size"],
        "layers_per_block": one_for_each(config, "layers_per_block", config["num_blocks"]),
        "width": config["channels"],
        "head_dim": config.get("head_dim", 64),
    }


def check_keys(config: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the missing and the unknown arguments."""
    missing = [key for key in required if key not in config]
    unknown = [key for key in config if key not in (*required, *optional)]
    if missing or unknown:
        raise ValueError(f"the published model's arguments lack {missing or 'nothing'} and have unknown {unknown}")


def convert_state_dict(
    state: dict[str, Tensor], config: dict[str, Any], only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The state dict of the `TARFlowModel` with `model_arguments` of ``config``.

    Buffers that the published code saves but does not need are dropped. No tensor is copied, but for the first layers
    of gated MLPs, which are two tensors there and one here.

    Args:
        state: the published state dict.
        config: the arguments of the published model class.
        only: make only these of the tensors; all are checked.

    Raises:
        ValueError: listing all tensors that are missing, unexpected or of another shape.
    """
    arguments = model_arguments(config)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in TARFlowModel(**arguments).state_dict().items()}
    places = [index for index, layers in enumerate(arguments["layers_per_block"]) if layers]  # the others are left out
    sources: dict[str, dict[str, Tensor]] = {}  # by our name; gated layers have two sources, "gate" and "up"
    unexpected = []
    for name, value in state.items():
        if name.split(".")[-1] in LEFT_OVERS or (name == "var" and is_starflow(config)):
            continue
        new_name, part = convert_name(name, places)
        if new_name in wanted:
            sources.setdefault(new_name, {})[part] = value
        elif not (new_name == "prior_variance" and bool((value == 1).all())):  # a unit prior's variance says nothing
            unexpected.append(name)
    for name, parts in list(sources.items()):
        if parts.keys() & {"gate", "up"} and parts.keys() != {"gate", "up"}:
            del sources[name]  # one half alone is no layer
    missing = [name for name in wanted if name not in sources]
    shapes = {name: joined_shape(parts, len(wanted[name])) for name, parts in sources.items()}
    wrong = [f"{name} {got} instead of {wanted[name]}" for name, got in shapes.items() if got != wanted[name]]
    if missing or unexpected or wrong:
        raise ValueError(f"missing tensors: {missing}; unexpected tensors: {unexpected}; wrong shapes: {wrong}")
    converted = {}
    for name, parts in sources.items():
        if only is None or name in only:
            joined = parts[""] if "" in parts else torch.cat([parts["gate"], parts["up"]])
            converted[name] = joined.reshape(wanted[name])
    return converted


def joined_shape(parts: dict[str, Tensor], dims: int) -> tuple[int, ...]:
    """Shape of one tensor, or of gate and up one after the other; extra axes of size 1 do not count."""
    shapes = [tuple(value.shape) for value in parts.values()]
    shape = (sum(part[0] for part in shapes), *shapes[0][1:])
    while len(shape) > dims and 1 in shape:
        shape = shape[: shape.index(1)] + shape[shape.index(1) + 1 :]
    return shape


def convert_name(name: str, places: list[int]) -> tuple[str, str]:
    """A published tensor's name as ours, and "gate" or "up" if it is that half of a gated MLP's first layer.

    Args:
        name: for example "blocks.0.attn_blocks.1.mlp.main.0.weight".
        places: the published indices of the blocks that have layers.
    """
    if name == "var":
        return "prior_variance", ""
    part, _, rest = name.partition(".")
    if part == "blocks":
        index, _, rest = rest.partition(".")
        if not index.isdigit() or int(index) not in places:
            return name, ""
        part = f"blocks.{places.index(int(index))}"
    elif part in PARTS:
        part = PARTS[part]
    else:
        return name, ""
    if not rest.startswith(LAYER_LISTS):
        stem, _, leaf = rest.rpartition(".")
        if stem in LEVEL_NAMES:
            return f"{part}.{LEVEL_NAMES[stem]}.{leaf}", ""
        stem, dot, leaf = rest.partition(".")
        return f"{part}.{BLOCK_NAMES.get(stem, stem)}{dot}{leaf}", ""
    _, layer, inner = rest.split(".", 2)
    stem, _, leaf = inner.rpartition(".")
    layer = f"{part}.layers.{layer}."
    if stem in ("mlp.gate_proj", "mlp.up_proj"):
        return f"{layer}mlp.up.{leaf}", stem.removeprefix("mlp.").removesuffix("_proj")
    return f"{layer}{LAYER_NAMES.get(stem, stem)}.{leaf}", ""
