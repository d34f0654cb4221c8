"""Training autoencoders, and finetuning a pipeline's decoder.

May import: common, data, data.stream, vae, pipeline.*, evaluation.*, training.loop, training.losses.
"""
