"""Latents of a data set, computed once and stored in shards.

May import: common, data, data.stream, vae, pipeline.*, training.loop, training.flow.
"""
