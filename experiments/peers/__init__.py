"""A flow beside what one would take instead, of the same latents, parameters and steps.

May import: common, configs, models, data, flows.*, vae, pipeline.*, evaluation.*, training.*.
"""
