"""Kinds of small flows, conditions and guidance that are tried with each way of using a flow."""

from __future__ import annotations

from typing import Any

import torch
from helpers import condition_of, random_images, small_model
from torch import Tensor

from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel

#: Flows of which each has another path through the attention.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class_vectors": {"conditioning": "class_vectors", "positions": "learned", "start_token": False},
    "prefix": {"conditioning": "prefix", "head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "positions": "rotary_1d"},
    "coupling": {"block": "coupling", "mixing": "lu", "actnorm": True, "conditioning": "class_prefix", "head_dim": 64},
    "inverse": {"block": "inverse_autoregressive"},
    "denoiser": {"learned_denoiser": "conditional", "denoiser_layers": 1, "conditioning": "class_vectors"},
}


def flow_of(kind: str, **changes: Any) -> tuple[TARFlowModel, Tensor, dict[str, Tensor]]:
    """A small flow, pictures and their condition."""
    torch.manual_seed(0)
    model = small_model(**{"sample_size": 6, **KINDS[kind], **changes})
    return model, random_images(model, 3), condition_of(model, 3)


#: Norms and attention of other kinds than the usual ones, all together.
RICH: dict[str, Any] = {
    "norm": "rms_norm",
    "mlp": "geglu",
    "qk_norm": True,
    "post_norm": True,
    "num_heads": 4,
    "num_kv_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "learned-vectors": {
        "positions": "learned",
        "conditioning": "class_vectors",
        "start_token": False,
        "scale": "exp",
        "soft_clip": 0.0,
        "final_norm": False,
    },
    "rotary-class_prefix": {"conditioning": "class_prefix"},
    "rotary-prefix": {"conditioning": "prefix"},
    "rotary_1d-prefix-shifted": {"conditioning": "prefix", "positions": "rotary_1d", "start_token": False},
    "rich-prefix": {"conditioning": "prefix", **RICH},
    "deep-prefix": {"conditioning": "prefix", "condition_blocks": "deep"},
    "coarse_to_fine-prefix": {
        "conditioning": "prefix",
        "deep_order": "coarse_to_fine",
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "outward-class": {"conditioning": "class_vectors", "num_classes": 3, "deep_order": "outward"},
    "unconditional": {},
}
GUIDANCES = {
    "none": None,
    "gaussian": Guidance(1.5),
    "linear": Guidance(2.0, "linear"),
    "linear_a": Guidance(1.0, "linear", "a"),
    "linear_b": Guidance(1.0, "linear", "b"),
    "linear_annealed": Guidance(2.0, "linear", annealed=True),
    "temperature": Guidance(1.0, "linear", temperature=1.7),
    "temperature_gaussian": Guidance(0.5, "gaussian", temperature=0.6),
}


def conditions(model: TARFlowModel, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """The condition and the null condition, as blocks take them."""
    given = condition_of(model, batch)
    cond = model.condition(given.get("class_labels"), given.get("cond"), batch)
    null = torch.randn(1, 3, model.config.cond_dim).double() if model.config.conditioning == "prefix" else None
    return cond, model.condition(None, null, batch)
