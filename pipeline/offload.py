"""Where a pipeline computes, and bringing offloaded parts there."""

from __future__ import annotations

from typing import Any

import torch


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
        return self.flow.blocks[-1].proj_in.weight.device

    @staticmethod
    def run_offload_hook(module: Any) -> None:
        """Bring an offloaded module to its device: its hook waits for ``forward``, which is not what is called here."""
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(module)
