"""Losses between pictures: distances, perceptual, adversarial.

May import: common, evaluation.features, training.loop.
"""
