"""Decode steps that are compiled, and on CUDA devices captured as graphs, once and for all batches of one shape."""

from __future__ import annotations

import torch
from diffusers.utils import logging
from torch import Tensor

from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.step import DecodeStep, ModuleStep, StaticStep, decode_step
from tarflow.flows.layers.prepared import leaves_after_use, may_prepare, state_of

logger = logging.get_logger(__name__)

NOT_COMPILED = (
    "Decode steps are not compiled for blocks with hooks, quantized or parametrized weights, or adapters other than plain "
    "LoRA in float32: these blocks go through their modules, which is right but slower. Fuse the adapters or remove the "
    "hooks, or leave enable_fast_decoding out."
)
OFFLOADED = (
    "Decode steps are not compiled where weights leave the device after each use, as with enable_model_cpu_offload: what is "
    "compiled would keep them there, and would have to be made anew for each call. Leave one of the two out."
)
#: Calls before a CUDA graph is captured: compilation and the libraries' own warm-up are then over.
WARM_UP_CALLS = 3


class FastStep:
    """A `StaticStep` whose arithmetic is compiled, and on a CUDA device replayed as one graph.

    Args:
        step: the step; its cache becomes this one's own.
        backend: of `torch.compile`; None does not compile.
    """

    def __init__(self, step: StaticStep, backend: str | None = "inductor"):
        self.step, self.graph = step, None
        device = step.cache.keys_values.device
        rows, channels = step.cache.keys_values.shape[1], step.config.token_dim
        weights = step.proj_out[0].dtype
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.inputs = torch.zeros(rows, channels, dtype=weights, device=device)
        self.function = step.parameters
        if backend is not None:
            self.function = torch.compile(step.parameters, backend=backend, dynamic=False, fullgraph=True)
        self.captures = device.type == "cuda"
        self.outputs: tuple[Tensor, Tensor] | None = None

    def start(self, run: InversionState) -> None:
        """Begin a sequence whose prefix is in the run's cache."""
        self.step.refresh()
        self.step.load(run.context, run.cache, run.temperature)
        self.position.fill_(self.step.cache.length)
        if self.captures and self.graph is None:
            self.capture()

    def capture(self) -> None:
        """Warm up on a side stream, as CUDA graphs want it, then capture one call."""
        position = self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.function(self.inputs, self.position)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.function(self.inputs, self.position)
            self.position.add_(1)
        self.graph = graph  # not before: after an error there is none
        self.position.copy_(position)  # what the capture wrote to the cache is written again at the first step

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As of `DecodeStep`; the results must be used before the next call."""
        self.inputs.copy_(inputs)
        if self.graph is not None:
            self.graph.replay()
            return self.outputs
        parameters = self.function(self.inputs, self.position)
        self.position.add_(1)
        return parameters


class FastSteps:
    """Fast steps by block and shape, made when they are first needed and kept.

    Args:
        backend: see `FastStep`.
    """

    def __init__(self, backend: str | None = "inductor"):
        self.backend = backend
        self.steps: dict[tuple, tuple[tuple, FastStep]] = {}

    def get(self, run: InversionState) -> FastStep | DecodeStep | ModuleStep:
        """The step of a run's block and shape, ready for its sequence. Made anew if the block has other weights or
        adapters; not compiled where something acts on the block's modules or takes its weights away, with a warning."""
        if leaves_after_use(run.block):
            logger.warning_once(OFFLOADED)
            self.steps = {key: step for key, step in self.steps.items() if key[0] != id(run.block)}
            return decode_step(run.block, run.context, run.cache, run.temperature)
        if not may_prepare(run.block):
            logger.warning_once(NOT_COMPILED)
            return ModuleStep(run.block, run.context, run.cache, run.temperature)
        block, shape = run.block, tuple(run.cache.keys_values.shape)
        key = (id(block), shape, run.context.prefix_length, run.cache.keys_values.dtype, run.temperature is None)
        weights = state_of(block)
        if key not in self.steps or self.steps[key][0] != weights:
            cache = block.new_cache(shape[1], run.cache.capacity, run.cache.keys_values.dtype)
            cache.keys_values.zero_()  # slots behind the mask must be finite
            step = StaticStep(block, run.context, cache, run.temperature)
            self.steps[key] = (weights, FastStep(step, self.backend))
        fast = self.steps[key][1]
        fast.start(run)
        return fast
