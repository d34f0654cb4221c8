"""What the benchmarks' options can be; apart from what measures, whose libraries take seconds to import."""

from __future__ import annotations

#: Ways of taking a step of training: the published step; ours in eager mode; with each Transformer layer compiled; with
#: activations computed again by layer or block. "compiled+layer" and "compiled+block" are both.
VARIANTS = ("published", "eager", "compiled", "layer", "block")
PRECISIONS = ("float32", "bfloat16")
#: Guidance scales and number of samples of `tarflow.benchmarks.exactness`.
SCALES, SAMPLES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0), 24
