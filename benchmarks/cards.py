"""What cards of some sizes can do with the 1.4-billion-parameter shape (configs/starflow_imagenet256.yaml), by counting."""

from __future__ import annotations

import math

#: GiB of a step of training in bfloat16, counted by `tarflow.benchmarks.memory`: without pictures, and of each picture.
TRAINING_GIB = {
    "published": (18.44, 2.138),
    "none": (18.42, 2.357),
    "block": (17.48, 1.457),
    "layer": (19.11, 0.340),
    "both": (20.98, 0.106),
}
#: GiB of the weights in bfloat16, and of each guided picture's keys and values in the deep block: the run's and the
#: compiled step's.
SAMPLING_GIB = (2.57, 2 * 0.282)
#: What cards of so many gigabytes report as theirs, in GiB, and what is left for libraries, kernels and fragments.
CARDS_GIB = {24: 23.5, 48: 47.4, 80: 79.1, 141: 139.7}
SPARE_GIB = 2.5


def largest_batch(mode: str, memory_gib: float) -> int:
    """Pictures of the largest step of training that fits; 0 if none does.

    Args:
        mode: one of `TRAINING_GIB`.
    """
    base, each = TRAINING_GIB[mode]
    return max(0, math.floor((memory_gib - SPARE_GIB - base) / each))


def training_batches(memory_gib: float) -> tuple[int, ...]:
    """Batch sizes worth measuring, the likely best first, so that there is a row when time runs out: the largest power of
    two that fits as it is, the largest multiple of 8, and twice the first, which checkpointing makes fit."""
    most = largest_batch("none", memory_gib)
    first = 1 << max(0, most.bit_length() - 1)
    return tuple(dict.fromkeys(batch for batch in (first, most - most % 8, 2 * first) if batch > 0))


def what_cards_can_do() -> list[dict[str, int]]:
    """A row for each size of card."""
    rows = []
    for gigabytes, memory in CARDS_GIB.items():
        weights, each = SAMPLING_GIB
        row = {"card, GB": gigabytes, "sampling: pictures at once": math.floor((memory - SPARE_GIB - weights) / each)}
        row |= {f"training: batch, {mode}": largest_batch(mode, memory) for mode in TRAINING_GIB}
        rows.append(row)
    return rows
