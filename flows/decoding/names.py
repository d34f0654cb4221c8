"""Names and numbers of ways to invert blocks; apart from what inverts, whose libraries take seconds to import."""

from __future__ import annotations

METHODS = ("auto", "sequential", "jacobi", "gs_jacobi", "parallel")
DEFAULT_TOLERANCE = 1e-4
FAST_TOLERANCE = 1e-2
