"""Pictures that are read as they come, from shards that no machine need hold: tar files and data sets by URL.

May import: common, data.
"""
