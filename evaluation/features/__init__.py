"""Numbers of sets of pictures: features of networks, and the distances and scores made of them.

May import: common, data, evaluation.images.
"""
