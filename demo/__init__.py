"""The web page that draws.

May import: common, data, models, flows.*, vae, pipeline.*, evaluation.*.
"""
