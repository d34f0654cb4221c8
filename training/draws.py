"""Everything random about one picture in one step, as a function of its place alone: on any number of processes, and
after any interruption, the same picture gets the same noise."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers of B pictures.

    Attributes:
        flipped, dropped: (B,) booleans: mirror the picture, drop its condition.
        noise: the training noise before it is scaled, (B, *shape), normal or uniform in [0, 1).
        posterior: normal numbers for the autoencoder's posterior, (B, *shape), None if not asked for.
    """

    flipped: Tensor
    dropped: Tensor
    noise: Tensor
    posterior: Tensor | None


def draw(
    seed: int,
    step: int,
    places: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device,
    drop_rate: float = 0.0,
    uniform: bool = False,
    posterior: bool = False,
) -> Draws:
    """Draws for the pictures at some places of a step's batch.

    Args:
        seed: of the run.
        step: the optimizer step; −1 is for evaluation.
        places: in the batch of all processes and passes of the step.
        shape: of one picture's latents, or of its pixels.
        device: where they are drawn; another device draws other numbers.
        drop_rate: how often a condition is dropped.
        uniform: whether the noise is uniform.
        posterior: whether the autoencoder's posterior is drawn from too.
    """
    chance, numbers = torch.Generator(), torch.Generator(device)
    flags = torch.empty(len(places), 2)
    values = torch.empty(len(places), 2 if posterior else 1, *shape, device=device)
    for row, place in enumerate(places):
        mixed = place_seed(seed, step, place)
        flags[row].uniform_(generator=chance.manual_seed(mixed))
        numbers.manual_seed(mixed)
        if uniform:
            values[row].uniform_(generator=numbers)
        else:
            values[row].normal_(generator=numbers)
    flags = flags.to(device)
    dropped = flags[:, 1] < drop_rate
    return Draws(flags[:, 0] < 0.5, dropped, values[:, 0], values[:, 1] if posterior else None)


def place_seed(seed: int, step: int, place: int) -> int:
    """A seed whose low bits too (a CPU's generator takes 32) differ for all steps and places."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, place), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
