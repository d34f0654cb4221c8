"""What only an exact flow can do: invert, interpolate, vary, fill, compare by likelihood.

May import: common, flows.*, pipeline.call.
"""
