"""Adapters of a pipeline's flow: loaded, weighted, fused, saved.

May import: common, flows.*.
"""
