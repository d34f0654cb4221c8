"""What is read at the end: metrics of samples, sweeps of settings, pages with charts.

May import: common, data, data.stream, pipeline.*, evaluation.*.
"""
