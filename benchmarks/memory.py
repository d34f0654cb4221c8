"""Peak memory of a training step, by kind, for any shape on any machine: tensors are counted, not allocated.

The step runs on PyTorch's fake tensors, which have shapes and no numbers, while each new storage is counted until it
is freed. PyTorch's own counter (`torch.distributed._tools.mem_tracker.MemTracker`) finds the same peak, in pieces of 512 bytes,
but it knows the parts of the peak only at the peak: how much activations take at their own, which is what checkpointing
changes, it does not tell. Neither sees what an operation allocates inside itself, nor the allocator's gaps.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tarflow.benchmarks.published_training import loss_as_published, optimizer_as_published
from tarflow.benchmarks.random_models import random_inputs, shape_of
from tarflow.flows.likelihood import flow_loss
from tarflow.flows.model import TARFlowModel

#: Columns of the table: what is computed again instead of kept, as `TARFlowModel.set_checkpointing` takes it.
MODES: dict[str, tuple[str, int]] = {
    "none": ("none", 1),
    "layer": ("layer", 1),
    "every 2nd layer": ("layer", 2),
    "block": ("block", 1),
    "both": ("both", 1),
}


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one training step in bytes.

    Attributes:
        parameters, gradients, optimizer: all of them.
        weight_copies: the most that low-precision copies of weights take, which autocast makes.
        activations: the most that everything else takes, during the forward and the backward pass.
        kept: what of the activations is left at the end of the forward pass, for the backward pass.
        block_inputs: B·T·C float32 numbers and one log-det per sample for each block, which stay in any mode.
        peak: the most of all together; less than the sum, as not all are largest at once.
    """

    parameters: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    kept: int
    block_inputs: int
    peak: int


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed.

    Args:
        known: tensors that are there already; they and their views are not counted.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.kinds: dict[int, str] = {}
        self.live = {"activations": 0, "weight_copies": 0, "gradients": 0}
        self.most = {**self.live, "together": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # fake tensors have no numbers; the only ones that are read say that labels are in range
        result = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.known
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage(), "weight_copies" if copies else "activations")
        return result

    def count(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key not in self.known and key not in self.kinds:
            self.kinds[key] = kind
            self.change(kind, storage.nbytes())
            weakref.finalize(storage, self.forget, key, storage.nbytes()).atexit = False

    def forget(self, key: int, size: int) -> None:
        self.change(self.kinds.pop(key), -size)

    def change(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        self.most["together"] = max(self.most["together"], sum(self.live.values()))

    def found_gradient(self, parameter: Tensor) -> None:
        """What the backward pass has left in ``parameter.grad`` is no activation; a hook of the parameter."""
        assert parameter.grad is not None  # it has just been made
        storage = parameter.grad.untyped_storage()
        kind = self.kinds[storage._cdata]
        if kind != "gradients":
            self.live[kind] -= storage.nbytes()
            self.kinds[storage._cdata] = "gradients"
            self.change("gradients", storage.nbytes())


def training_memory(
    arguments: dict[str, Any],
    batch: int,
    prefix_length: int = 0,
    precision: str = "bfloat16",
    mode: str = "none",
    published: bool = False,
    device: str = "cpu",
    fake: bool = True,
) -> TrainingMemory:
    """Memory of a step of AdamW, gradients clipped, in the steady state (the optimizer has its moments already).

    Args:
        arguments: of `TARFlowModel`.
        prefix_length: tokens of the condition with the conditioning "prefix".
        precision: "float32", or "bfloat16" for float32 weights under autocast.
        mode: one of `MODES`, or "reversible" for coupling models.
        published: the published step instead, see `tarflow.benchmarks.published_training`; it has no other mode.
        device: whose operations are counted: "cuda" needs one, if it is fake or not. On a CPU short sequences have an
            attention of their own, which keeps more.
        fake: count only; else the step really runs.
    """
    with FakeTensorMode() if fake else nullcontext():
        with torch.device(device):
            model = TARFlowModel(**arguments)
        model.set_checkpointing(*MODES.get(mode, (mode, 1)))
        inputs = random_inputs(model, batch, prefix_length)
        parameters = list(model.parameters())
        optimizer = optimizer_as_published(model, 0.0) if published else torch.optim.AdamW(parameters, fused=True)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        moments = [value for state in optimizer.state.values() for value in state.values()]
        buffers = [*model.buffers(), *inputs.values()]
        counter = StorageCounter([*parameters, *moments, *buffers])
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(counter.found_gradient)
        with counter:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = loss_as_published(model, **inputs) if published else flow_loss(*model(**inputs))
            kept = counter.live["activations"]
            loss.backward()
            activations = counter.most["activations"]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        side = model.config.sample_size // model.config.patch_size
        token_bytes = 4 * side**2 * model.config.in_channels * model.config.patch_size**2
        known = [sum(tensor.nbytes for tensor in tensors) for tensors in (parameters, moments)]
        return TrainingMemory(
            parameters=known[0],
            gradients=counter.live["gradients"],
            optimizer=known[1],
            weight_copies=counter.most["weight_copies"],
            activations=activations,
            kept=kept,
            block_inputs=len(model.blocks) * batch * (token_bytes + 4),
            peak=sum(known) + counter.most["together"],
        )


def memory_of(name: str, batch: int, precision: str = "bfloat16", device: str = "cpu") -> dict[str, TrainingMemory]:
    """Memory of a step of a configuration for the published step and for each of `MODES`."""
    shape = shape_of(name)
    results = {
        "published": training_memory(shape.arguments, batch, shape.prefix_length, precision, "none", True, device)
    }
    for mode in MODES:
        results[mode] = training_memory(shape.arguments, batch, shape.prefix_length, precision, mode, False, device)
    return results


def memory_table(
    arguments: dict[str, Any], blocks: list[int], layers: list[int], batch: int, precision: str = "bfloat16"
) -> list[dict[str, Any]]:
    """Rows for each number of equal blocks and layers of a block, with the memory in each of `MODES`.

    Args:
        arguments: of `TARFlowModel`, without layers_per_block.
    """
    rows = []
    for count in blocks:
        for depth in layers:
            model = {**arguments, "layers_per_block": [depth] * count}
            modes = {mode: training_memory(model, batch, 0, precision, mode) for mode in MODES}
            rows.append({"blocks": count, "layers": depth, "modes": modes})
    return rows
