"""Kinds of blocks, each an invertible map of tokens: autoregressive, coupling, inverse autoregressive.

May import: common, flows.layers, flows.decoding.
"""
