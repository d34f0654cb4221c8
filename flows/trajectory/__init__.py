"""Pictures from a short chain of noise levels: a shallow invertible map and a deep Gaussian predictor, with the exact likelihood of the whole chain.

May import: common, flows, flows.layers, flows.blocks, flows.decoding, flows.adapters.
"""
