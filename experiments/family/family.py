"""The family of flows at one budget, and a small loop that trains each of them.

Shapes: B batch, C channels, H × W.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarflow.common.machine import best_of
from tarflow.common.statistics import mean_and_error
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.likelihood import log_prob, nats_per_dim
from tarflow.flows.model import TARFlowModel

#: Settings of each flow; all have eight layers of one width in their blocks, so nearly as many parameters. NICE's
#: scaling of each number at the end is an actnorm here: a constant for each channel, which couplings do not see.
FAMILY: dict[str, dict[str, Any]] = {
    "NICE": {"block": "coupling", "scale": "additive", "actnorm": True, "layers_per_block": [1] * 8},
    "RealNVP": {"block": "coupling", "layers_per_block": [1] * 8},
    "Glow": {"block": "coupling", "mixing": "lu", "actnorm": True, "layers_per_block": [1] * 8},
    "IAF": {"block": "inverse_autoregressive", "layers_per_block": [2] * 4},
    "TARFlow": {"layers_per_block": [2] * 4},
    "STARFlow": {"layers_per_block": [1, 1, 1, 5]},
}
#: A batch of data with its noise and labels (None without), from a generator.
Batches = Callable[[torch.Generator, int], tuple[Tensor, Tensor | None]]
WARM_UP = 20
#: Steps whose time is taken together; the fastest such run counts, so that other work on the machine matters little.
TIMED_TOGETHER = 10


def nll(model: Any, x: Tensor, labels: Tensor | None) -> Tensor:
    """Mean negative log-likelihood per number with the model's own prior, a scalar."""
    return nats_per_dim(log_prob(model, x, labels), x[0].numel()).mean()


def fit(
    model: Any,
    batches: Batches,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    loss: Callable[[Any, Tensor, Tensor | None], Tensor] = nll,
    seed: int = 0,
) -> dict[str, float]:
    """Train a model with AdamW, a short warm-up and a cosine to zero, gradients clipped at 1.

    Args:
        model: a `TARFlowModel`, or any module that ``loss`` takes. An actnorm is set by the first batch.
        batches: the data.
        loss: of model, batch and labels.
        seed: of the batches.

    Returns:
        the last ``loss`` (mean of a tenth of the steps), ``seconds``, and ``images_per_second`` of the fastest steps.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    if isinstance(model, TARFlowModel):
        x, labels = batches(generator, 256)
        model.initialize_actnorm(x, labels)
    losses, times = [], [time.perf_counter()]
    for step in range(steps):
        factor = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        x, labels = batches(generator, batch_size)
        optimizer.zero_grad()
        value = loss(model, x, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(value.detach()))
        times.append(time.perf_counter())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; lower the learning rate {lr}")
    together = min(TIMED_TOGETHER, steps)
    fastest = min(times[i + together] - times[i] for i in range(steps - together + 1))
    last = losses[-max(1, steps // 10) :]
    return {
        "loss": sum(last) / len(last),
        "seconds": times[-1] - times[0],
        "images_per_second": together * batch_size / fastest,
    }


@torch.no_grad()
def held_out_nats(model: Any, x: Tensor, labels: Tensor | None, batch_size: int = 500) -> tuple[float, float]:
    """Nats per number of held-out data (N, C, H, W), and the standard error over samples."""
    parts = zip(x.split(batch_size), [None] * len(x) if labels is None else labels.split(batch_size), strict=False)
    values = torch.cat([nats_per_dim(log_prob(model, part, part_labels), x[0].numel()) for part, part_labels in parts])
    return mean_and_error(values)


@torch.no_grad()
def draw(
    model: Any,
    count: int,
    labels: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
    guidance: Guidance | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Samples (count, C, H, W).

    Args:
        labels: (count,), or None.
        shape: (C, H, W); the model's own if not given.
        guidance: None for none.
        temperature: a factor on the noise.
    """
    size = model.config.sample_size
    shape = shape or (model.config.in_channels, size, size)
    z = temperature * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    null_cond = None if guidance is None else model.condition(None, None, count)
    return generate(model, z, model.condition(labels, None, count), null_cond, guidance)[0]


def drawing_speed(model: Any, count: int, labels: Tensor | None = None, shape: Any = None) -> float:
    """Samples per second, of the fastest of five draws; arguments as of `draw`."""
    return count / best_of(lambda: draw(model, count, labels, shape), torch.device("cpu"))
