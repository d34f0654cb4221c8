"""Comparisons behind the docs' tables: decoding methods, students.

May import: common, configs, models, data, flows.*, vae, pipeline.*, evaluation.*, benchmarks.
"""
