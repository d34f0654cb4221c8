"""Comparisons behind the docs' tables: decoding methods, students, noise levels; in rooms of their own kinds of flows, and
peers.

May import: common, configs, models, data, data.stream, flows.*, vae, pipeline.*, evaluation.*, benchmarks.
"""
