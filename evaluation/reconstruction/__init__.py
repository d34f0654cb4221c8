"""How near pictures come to their originals: by autoencoder, with the training noise, and with each way to remove it.

May import: common, data, data.stream, pipeline.*, evaluation.likelihood.
"""
