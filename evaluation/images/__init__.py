"""Sets of pictures to compare, wherever they lie, and the store of sampled ones.

May import: common, data, data.stream.
"""
