"""Training flows by maximum likelihood: alone, with the autoencoder, or adapters of one.

May import: common, data.*, models, flows.*, vae, pipeline.*, evaluation.*, training.loop, training.losses,
training.autoencoder.
"""
