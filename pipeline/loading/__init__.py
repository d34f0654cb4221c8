"""Pipelines in folders, archives and on the hub: found, checked, written whole or not at all.

May import: common, models, flows.*, vae.
"""
