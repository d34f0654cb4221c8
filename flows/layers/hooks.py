"""Whether calling a module does more than its class says."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` of its own."""
    return any(getattr(module, name) for name in HOOKS) or "forward" in vars(module)


def globally_hooked() -> bool:
    """Whether there are hooks on all modules of the process."""
    return any(getattr(torch_module, f"_global{name}") for name in HOOKS[:2])
