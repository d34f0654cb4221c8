"""Which layers adapters are for; apart from the adapters, whose libraries take seconds to import."""

from __future__ import annotations

#: Layers that get an adapter where none are named: those of attention and MLP.
LORA_TARGETS = ("qkv", "proj", "up", "down")
