"""Where a pipeline computes, and bringing offloaded parts there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Offloading:
    """`TARFlowPipeline`'s devices."""

    @property
    def _execution_device(self) -> torch.device:
        """Where calls compute. Diffusers' own goes through all modules several times, which takes longer than a student's
        pass; it is needed only where offloading has hooked into one."""
        parts = (self.flow, self.student, self.vae, self.finetuned_decoder, self.text_encoder)
        modules = (module for part in parts if part is not None for module in part.modules())
        if any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in modules):
            return super()._execution_device
        return next(self.flow.parameters()).device

    def run_offload_hook(self, module: Any) -> None:
        """Bring an offloaded module to its device, and the others away: its hook waits for ``forward``, which is not what
        is called here, and knows of the module before it alone."""
        hook = getattr(module, "_hf_hook", None)
        if hook is None:
            return
        for other in getattr(self, "_all_hooks", ()):
            if other.model is not module:
                other.offload()
        hook.pre_forward(module)


def missing_tensors(module: nn.Module) -> list[str]:
    """Parameters and buffers that a module has no values of, nor a hook that would bring them."""
    missing = []
    for prefix, part in module.named_modules():
        if getattr(part, "_hf_hook", None) is None:
            named = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            missing += [f"{prefix}.{name}" if prefix else name for name, value in named if value.device.type == "meta"]
    return missing
