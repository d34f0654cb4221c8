"""Pictures with captions or labels, from folders, archives, named data sets, and drawings made here; cached latents.

May import: common.
"""
