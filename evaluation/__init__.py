"""How good samples and likelihoods are; a room for each question.

May import: nothing else of the project.
"""
