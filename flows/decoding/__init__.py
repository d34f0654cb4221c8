"""Noise to data: a block inverted token by token or by fixed-point iteration, and which of them is fastest.

May import: common, flows.layers.
"""
