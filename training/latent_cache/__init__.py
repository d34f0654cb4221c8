"""Latents of a data set, computed once and stored in shards.

May import: common, data, vae, pipeline.*, training.loop, training.flow.
"""
