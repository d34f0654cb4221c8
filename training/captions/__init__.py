"""Training a model of pictures and captions, by which samples are told whether they show what was asked for.

May import: common, data, data.stream, evaluation.features, pipeline.loading, training.loop.
"""
