"""How good samples and likelihoods are: a room for each question, and what the samples of all of them are drawn from.

May import: data, data.stream, pipeline, pipeline.call, pipeline.loading.
"""
