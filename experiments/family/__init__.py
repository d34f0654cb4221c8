"""Kinds of flows compared on a plane, on digits and on latents.

May import: common, configs, models, data, flows.*, vae, evaluation.*, benchmarks.
"""
