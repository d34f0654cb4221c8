"""Samples by the thousand, the record of how they were made, and whether they show what was asked for.

May import: common, data, data.stream, flows.*, vae, pipeline.*, evaluation, evaluation.images.
"""
