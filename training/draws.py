"""Everything random about one picture in one step, as a function of its place alone: on any number of processes, and
after any interruption, the same picture gets the same noise."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_chances(seed: int, step: int, places: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Two numbers in [0, 1) for each of some places of a step's batch, (B,) each: whether to mirror a picture, and
    whether to drop its condition. See `draw_noise` for the arguments."""
    generator, values = torch.Generator(), torch.empty(len(places), 2)
    for row, place in enumerate(places):
        values[row].uniform_(generator=generator.manual_seed(place_seed(seed, step, place)))
    flip, drop = values.to(device).unbind(1)
    return flip, drop


def draw_noise(
    seed: int, step: int, places: Sequence[int], shape: tuple[int, ...], device: torch.device, uniform: bool = False
) -> Tensor:
    """Normal numbers, or uniform ones in [0, 1), for the pictures at some places of a step's batch: (B, *shape).

    Args:
        seed: of the run.
        step: the optimizer step; −1 is for evaluation.
        places: in the batch of all processes and passes of the step.
        shape: of one picture's numbers.
        device: where they are drawn; another device draws other numbers.
        uniform: uniform instead of normal.
    """
    generator, values = torch.Generator(device), torch.empty(len(places), *shape, device=device)
    for row, place in enumerate(places):
        generator.manual_seed(place_seed(seed, step, place))
        if uniform:
            values[row].uniform_(generator=generator)
        else:
            values[row].normal_(generator=generator)
    return values


def place_seed(seed: int, step: int, place: int) -> int:
    """A seed whose low bits too (a CPU's generator takes 32) differ for all steps and places."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, place), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
