"""Everything random about one picture in one step, as a function of its number and of what it is for: on any number of
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
    "dropout",  # what an adapter does not see; by process instead of by picture
]


def draw_chances(seed: int, step: int, sample_ids: Sequence[int], device: torch.device, purpose: Purpose) -> Tensor:
    """A number in [0, 1) for each of some pictures of a step's batch, (B,), the same on every device; see `draw_noise` for
    the arguments."""
    # 24 bits are what a float32 in [0, 1) has.
    bits = [sample_seed(seed, step, sample_id, purpose) >> 39 for sample_id in sample_ids]
    return (torch.tensor(bits, dtype=torch.float32) / 2**24).to(device)


def draw_noise(
    seed: int,
    step: int,
    sample_ids: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device,
    purpose: Purpose,
    uniform: bool = False,
) -> Tensor:
    """Normal numbers, or uniform ones in [0, 1), for some pictures of a step's batch: (B, *shape).

    Args:
        seed: of the run.
        step: the optimizer step; −1 is for evaluation.
        sample_ids: numbers of the pictures in the batch of all processes and passes of the step.
        shape: of one picture's numbers.
        device: where they are drawn; another device draws other numbers.
        purpose: what they are for; numbers of different purposes are independent.
        uniform: uniform instead of normal.
    """
    generator, values = torch.Generator(device), torch.empty(len(sample_ids), *shape, device=device)
    for row, sample_id in enumerate(sample_ids):
        generator.manual_seed(sample_seed(seed, step, sample_id, purpose))
        if uniform:
            values[row].uniform_(generator=generator)
        else:
            values[row].normal_(generator=generator)
    return values


def sample_seed(seed: int, step: int, sample_id: int, purpose: Purpose) -> int:
    """A seed of 63 bits whose low bits too (a CPU's generator takes 32) differ for all steps, pictures and purposes."""
    # The purpose goes into the hash's own place for it, so that no other numbers can give the same input.
    digest = hashlib.blake2b(
        struct.pack("<qqq", seed, step, sample_id), digest_size=8, person=purpose.encode()
    ).digest()
    return int.from_bytes(digest, "little") >> 1
