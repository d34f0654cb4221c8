"""Low-rank adapters of a flow (LoRA): added, changed, stored.

May import: common, flows.layers.
"""
