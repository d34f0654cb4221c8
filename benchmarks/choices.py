"""What the benchmarks' options can be; apart from what measures, whose libraries take seconds to import."""

from __future__ import annotations

#: Ways of taking a step of training: the published step; ours in eager mode; with each Transformer layer compiled; with
#: activations computed again by layer or block. "compiled+layer" and "compiled+block" are both.
VARIANTS = ("published", "eager", "compiled", "layer", "block")
PRECISIONS = ("float32", "bfloat16")
#: Sources of `tarflow benchmark data`.
DATA_SOURCES = (
    *("folder", "zip", "parquet", "parquet stream", "tar stream"),
    *("latents", "latents memory", "latents http"),
)
#: Guidance scales and number of samples of `tarflow.benchmarks.exactness`.
SCALES, SAMPLES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0), 24
#: Checks of `tarflow gpu-check`, what is worth most first, with the seconds that each may take on an H100.
GPU_CHECKS = {
    "agreement": 15,
    "sampling": 170,
    "training-speed": 110,
    "emoji": 100,
    "cards": 5,
    "profile": 60,
    "calibration": 60,
    "graphs": 55,
    "bfloat16": 10,
    "student": 20,
    "memory": 30,
    "training": 70,
    "compiled-training": 30,
    "tests": 55,
    "sharded": 80,
}
#: The calls of a run, of five to seven minutes.
GPU_PARTS = {
    1: ("agreement", "sampling", "training-speed"),
    2: ("emoji", "cards", "profile", "calibration", "graphs", "bfloat16", "student"),
    3: ("memory", "training", "compiled-training", "tests", "sharded"),
}
