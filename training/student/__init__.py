"""Training students, which map noise to data in one pass.

May import: common, data, flows.*, vae, pipeline.*, evaluation.*, training.loop, training.losses.
"""
