"""Passes of small models as CUDA graphs: forward and backward of a batch in one launch, instead of some thousand.

A small model's step is bound by the host, which launches each operation; the device waits. A graph is what it launched once,
launched again as a whole, with other numbers in the same places.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

#: Passes of a shape that are made as usual, before one is captured: libraries then have what they make at first use.
WARM_UP = 3
#: Shapes that are captured at most; each keeps the memory of its activations and gradients.
MOST_SHAPES = 4

Outputs = tuple[dict[str, Tensor], Tensor]
#: What a capture gives: a function that does the same again, and the outputs, whose tensors it writes to.
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

logger = logging.getLogger(__name__)


def capture_on_cuda(work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """A CUDA graph of some work, which is recorded and not done. The threads of data loaders may go on meanwhile."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()
    return graph.replay, outputs


def check_graphs(accelerator: Accelerator) -> None:
    """Whether passes can be captured.

    Raises:
        ValueError: on another device, with several processes, or of weights that are divided (FSDP).
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("train.cuda_graphs is for weights that are whole, not sharded (FSDP): leave one of them out")
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes on {accelerator.device.type}"
        raise ValueError(f"train.cuda_graphs is for one process on a CUDA device, not {where}: leave it out")


def on_side_stream(work: Callable[[], Outputs]) -> Outputs:
    """Work on a stream of its own, as captures want it to have been done once; on other devices simply done."""
    if not torch.cuda.is_available():
        return work()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = work()
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


class ReplayedPass:
    """The gradients of a batch, as ``work`` gives them: it fills the parameters' ``grad``, which must be None before, and
    returns tensors by name and another tensor.

    Results, and gradients, are those of the last call: the next one writes to the same places.

    Args:
        work: of inputs by name, tensors and other values.
        parameters: whose gradients it fills.
        capture: what records it.
    """

    def __init__(
        self,
        work: Callable[[dict[str, Any]], Outputs],
        parameters: Sequence[nn.Parameter],
        capture: Capture = capture_on_cuda,
    ):
        self.work, self.parameters, self.capture = work, list(parameters), capture
        self.calls: dict[Any, int] = defaultdict(int)
        self.recorded: dict[Any, Recording] = {}
        self.failed = False

    def __call__(self, inputs: dict[str, Any]) -> Outputs:
        key = shape_of(inputs)
        if key in self.recorded:
            return self.recorded[key].replay(inputs, self.parameters)
        self.calls[key] += 1
        if self.failed or self.calls[key] <= WARM_UP or len(self.recorded) >= MOST_SHAPES:
            return self.work(inputs)
        return self.record(key, inputs)

    def record(self, key: Any, inputs: dict[str, Any]) -> Outputs:
        """A pass as usual, which is then recorded for those to come."""
        places = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}

        def work() -> Outputs:  # of the same numbers, without the gradients of inputs of an earlier call
            return self.work({n: value.detach() if isinstance(value, Tensor) else value for n, value in places.items()})

        losses, z = on_side_stream(work)
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        try:
            replay, outputs = self.capture(work)
            own = [parameter.grad for parameter in self.parameters]
            self.recorded[key] = Recording(places, replay, outputs, own)
        except RuntimeError as error:
            self.failed = True
            if stream is not None:  # which a capture that failed at its end has not left
                torch.cuda.set_stream(stream)
            logger.warning(f"The pass could not be captured as a CUDA graph and is made as usual: {error}")
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return losses, z


class Recording:
    """A recorded pass.

    Args:
        places: inputs by name; what is a tensor is written to.
        replay: does it again.
        outputs: whose tensors it fills.
        gradients: of the parameters, likewise.
    """

    def __init__(
        self,
        places: dict[str, Any],
        replay: Callable[[], None],
        outputs: Outputs,
        gradients: list[Tensor | None],
    ):
        self.places, self.again, self.outputs, self.gradients = places, replay, outputs, gradients

    def replay(self, inputs: dict[str, Any], parameters: Sequence[nn.Parameter]) -> Outputs:
        """The pass with other inputs of the same shapes."""
        with torch.no_grad():
            for name, place in self.places.items():
                if isinstance(place, Tensor):
                    place.copy_(inputs[name], non_blocking=True)
        self.again()
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.outputs


def shape_of(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for a recorded pass to serve."""
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in sorted(inputs.items())
    )
