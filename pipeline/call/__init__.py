"""What a call does, step by step: inputs checked, prompts encoded, noise inverted, noise removed, pictures decoded.

May import: common, models, flows.*, vae, pipeline.loading, pipeline.text.
"""
