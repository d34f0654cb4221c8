"""What blocks are made of: the affine map, token orders, conditions, guidance, the causal Transformer and its cache.

May import: common.
"""
