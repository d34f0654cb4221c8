"""Training; a room for what is trained, and one for what every training shares.

May import: nothing else of the project.
"""
