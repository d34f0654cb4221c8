"""Captions to condition tokens, by any text encoder of Transformers.

May import: common.
"""
