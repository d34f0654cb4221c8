"""Training students, which map noise to data in one pass.

May import: common, data, data.stream, flows.*, vae, pipeline.*, evaluation.*, training.loop, training.losses.
"""
