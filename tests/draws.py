"""What the tests of random numbers ask: a training's parts and pictures, and whether draws are independent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tarflow.training.flow.arguments import parse_config

COUNT, CPU = 20_000, torch.device("cpu")
#: Of an estimated mean or correlation, in its standard deviations. The numbers are always the same ones.
LIMIT = 5.5
CLASSES = 3
SHAPE = (2, 4, 4)


def assert_independent(**draws: Tensor) -> None:
    """Columns of draws (N,) or (N, …): means, deviations, and correlations of all with all of other names and other
    columns, also of their squares, which tell of draws whose size depends on another one."""
    columns, owners = [], []
    for number, values in enumerate(draws.values()):
        values = values.double().flatten(1) if values.ndim > 1 else values.double()[:, None]
        for column in values.unbind(1):
            own = len(set(owners)), number
            for power in (column, column.square()):
                if power.std() > 1e-9 and (power is column or not is_binary(column)):
                    columns.append((power - power.mean()) / power.std())
                    owners.append(own)
    table = torch.stack(columns, 1)
    correlations = (table.T @ table / len(table)).abs()
    same = torch.tensor([[a == b for b in owners] for a in owners])
    assert float(correlations.masked_fill(same, 0).max()) < LIMIT / len(table) ** 0.5


def is_binary(values: Tensor) -> bool:
    return len(values.unique()) == 2


def run_config(*arguments: str) -> Any:
    flow = '{"layers_per_block": [1], "width": 32, "head_dim": 32, "conditioning": "class_prefix"}'
    return parse_config(["--data", "{}", "--output", "run", "--flow", flow, *arguments])[0]


class Codec:
    """Encodes pictures whose channel 0 has a posterior of no width, and 1 one of a great width."""

    factor = 1

    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        std = torch.zeros(len(images), *SHAPE)
        std[:, 1] = 1e6
        return images[:, :2], std

    def normalise(self, latents: Tensor) -> Tensor:
        return latents


def pictures() -> Tensor:
    """White on the left, black on the right, uint8 (COUNT, 3, 4, 4)."""
    images = torch.zeros(COUNT, 3, *SHAPE[1:], dtype=torch.uint8)
    images[..., :2] = 255
    return images


def parts() -> Any:
    arguments = {"num_classes": CLASSES, "in_channels": 2, "sample_size": 4}
    return SimpleNamespace(codec=Codec(), flow_arguments=arguments, null_cond=None)
