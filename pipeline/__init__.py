"""`TARFlowPipeline`: prompts to pictures and back, opened from a folder or the hub.

May import: common, models, flows.*, vae, pipeline.call, pipeline.editing, pipeline.loading, pipeline.lora,
pipeline.text.
"""
