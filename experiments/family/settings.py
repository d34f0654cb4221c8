"""Settings of the comparison of flows."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("plane", "digits", "latents", "memory")


@dataclass(frozen=True, kw_only=True)
class FlowComparison:
    """What to compare.

    Attributes:
        output: folder of the runs, ``flows.md`` and pictures. What is there of the same settings is not made again.
        parts: some of "plane", "digits", "latents" and "memory".
        quick: few steps, meant for a quarter of an hour on two CPU cores; the other form takes hours.
        seed: of weights and batches.
    """

    output: str = "runs/flows"
    parts: tuple[str, ...] = PARTS
    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"parts is empty: give some of {', '.join(PARTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"a part must be one of {', '.join(PARTS)}, got {part!r}")
