"""The map between latents and noise as a model: built of blocks, its likelihood, score step, students and file formats.

May import: common, flows.layers, flows.adapters, flows.decoding, flows.blocks.
"""
