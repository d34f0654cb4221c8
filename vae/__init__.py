"""Pictures to latents and back, by Diffusers' autoencoders.

May import: common, models.
"""
