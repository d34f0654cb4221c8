"""Numbers of tensors, whatever they are stored as."""

from __future__ import annotations

from torch import Tensor, nn


def is_quantized(value: Tensor) -> bool:
    """Whether a tensor is of a class that stores fewer bits than its dtype says, as TorchAO's are."""
    return type(value) not in (Tensor, nn.Parameter) and hasattr(value, "dequantize") and hasattr(value, "qdata")


def dequantized(value: Tensor) -> Tensor:
    """A tensor's numbers as a plain tensor."""
    return value.detach().dequantize() if is_quantized(value) else value
