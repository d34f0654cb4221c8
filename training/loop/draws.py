"""Everything random about one picture in one step, as a function of its place and of what it is for: on any number of
processes, and after any interruption, the same picture gets the same noise."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

#: What a number is drawn for. Each purpose has a stream of its own: two of one stream would be tied to each other, as a
#: generator of normal numbers makes the first of them of the uniform ones that it would give first.
Purpose = Literal[
    "noise",  # the training noise, of Gaussian and of uniform kind
    "posterior",  # the draw from the autoencoder's posterior
    "flip",  # whether a picture is mirrored
    "drop",  # whether its condition is dropped
    "unguided",  # whether a student learns it without guidance
    "guidance",  # the guidance weight that a student learns it with
    "student prior",  # the noise of a student's own sample
    "student noise",  # the training noise on it
    "held out",  # the noise on a held-out picture
    "dropout",  # what an adapter does not see; by process instead of by place
]


def draw_chances(seed: int, step: int, places: Sequence[int], device: torch.device, purpose: Purpose) -> Tensor:
    """A number in [0, 1) for each of some places of a step's batch, (B,), the same on every device; see `draw_noise` for
    the arguments."""
    # 24 bits are what a float32 in [0, 1) has.
    bits = [place_seed(seed, step, place, purpose) >> 39 for place in places]
    return (torch.tensor(bits, dtype=torch.float32) / 2**24).to(device)


def draw_noise(
    seed: int,
    step: int,
    places: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device,
    purpose: Purpose,
    uniform: bool = False,
) -> Tensor:
    """Normal numbers, or uniform ones in [0, 1), for the pictures at some places of a step's batch: (B, *shape).

    Args:
        seed: of the run.
        step: the optimizer step; −1 is for evaluation.
        places: in the batch of all processes and passes of the step.
        shape: of one picture's numbers.
        device: where they are drawn; another device draws other numbers.
        purpose: what they are for; numbers of different purposes are independent.
        uniform: uniform instead of normal.
    """
    generator, values = torch.Generator(device), torch.empty(len(places), *shape, device=device)
    for row, place in enumerate(places):
        generator.manual_seed(place_seed(seed, step, place, purpose))
        if uniform:
            values[row].uniform_(generator=generator)
        else:
            values[row].normal_(generator=generator)
    return values


def place_seed(seed: int, step: int, place: int, purpose: Purpose) -> int:
    """A seed of 63 bits whose low bits too (a CPU's generator takes 32) differ for all steps, places and purposes."""
    # The purpose goes into the hash's own place for it, so that no other numbers can give the same input.
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, place), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1
