"""All random numbers for a picture in a step. They depend only on the picture's number in the step and on their
purpose, so a picture gets the same noise on any number of processes and after any interruption."""

from __future__ import annotations

import hashlib
import math
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
    "level",  # which level the training noise has
    "flip",  # whether a picture is mirrored
    "drop",  # whether its condition is dropped
    "unguided",  # whether a student learns it without guidance
    "guidance",  # the guidance weight that a student learns it with
    "reuse",  # which earlier pairs a student sees again
    "student prior",  # the noise of a student's own sample
    "student noise",  # the training noise on it
    "time",  # how far a diffusion model's picture is on its way to noise
    "held out",  # the noise on a held-out picture
    "chain",  # the noise of a trajectory's steps
    "chain length",  # how many steps it has
    "chain step",  # which of them is learned
    "dropout",  # what an adapter does not see; by process instead of by picture
]


#: 2⁶⁴ over the golden ratio, as an int64: steps of splitmix64's counter.
GOLDEN = -0x61C8864680B583EB


def draw_chances(seed: int, step: int, sample_ids: Sequence[int], device: torch.device, purpose: Purpose) -> Tensor:
    """A number in [0, 1) for each of some pictures of a step's batch, (B,), the same on every device; see `draw_noise` for
    the arguments."""
    # 24 bits are what a float32 in [0, 1) has.
    bits = [sample_seed(seed, step, sample_id, purpose) >> 39 for sample_id in sample_ids]
    return (torch.tensor(bits, dtype=torch.float32) / 2**24).to(device, non_blocking=True)


def draw_flipped(flip: bool, seed: int, step: int, sample_ids: Sequence[int], device: torch.device) -> Tensor | None:
    """Which pictures of a step's batch are mirrored, half of them, (B,); None if none is to be. See `draw_noise`."""
    return draw_chances(seed, step, sample_ids, device, "flip") < 0.5 if flip else None


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

    Each picture has a generator of its own; on a CUDA device, where that would be some launches for each picture, the
    numbers of all are made at once, see `counted_noise`.

    Args:
        seed: of the run.
        step: the optimizer step; −1 is for evaluation.
        sample_ids: numbers of the pictures in the batch of all processes and passes of the step.
        shape: of one picture's numbers.
        device: where they are drawn; another device draws other numbers.
        purpose: what they are for; numbers of different purposes are independent.
        uniform: uniform instead of normal.
    """
    if device.type == "cuda":
        return counted_noise(sample_seed(seed, step, -1, purpose), sample_ids, shape, device, uniform)
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


def counted_noise(
    key: int, sample_ids: Sequence[int], shape: tuple[int, ...], device: torch.device, uniform: bool = False
) -> Tensor:
    """Numbers as of `draw_noise`, each a function of a key, its picture's number and its own index there, so that some
    dozens of operations make those of all pictures: (B, *shape) float32.

    The counter goes through the finaliser of splitmix64 (two multiplications between shifted copies of itself), keyed by
    what the picture's number gives in the same way; normal numbers come of two uniform ones (Box and Muller).
    """
    count = math.prod(shape)
    index = torch.arange(2 * ((count + 1) // 2), device=device)  # an even number, for pairs
    rows = torch.tensor(list(sample_ids)).to(device, non_blocking=True)  # the host need not wait for the device
    keys = mixed(mixed(rows * GOLDEN + key) + key)
    bits = mixed(keys[:, None] + (index + 1)[None] * GOLDEN)
    numbers = ((bits >> 40) & (2**24 - 1)).float() / 2**24  # 24 bits are what a float32 in [0, 1) has
    if not uniform:
        first, second = numbers.chunk(2, dim=1)
        radius = (-2 * torch.log1p(-first)).sqrt()  # 1 − first is above 0
        angle = 2 * math.pi * second
        numbers = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return numbers[:, :count].reshape(len(sample_ids), *shape)


def mixed(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64, of int64 numbers as bits."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ shifted(bits, shift)) * factor
    return bits ^ shifted(bits, 31)


def shifted(bits: Tensor, by: int) -> Tensor:
    """Shifted to the right, zeros coming in from the left."""
    return (bits >> by) & (2 ** (64 - by) - 1)
