"""Likelihood of held-out pictures, and telling other pictures by it.

May import: common, data, flows.*, pipeline.*.
"""
