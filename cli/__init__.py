"""The command `tarflow`: one file a subcommand, thin; the work is done elsewhere.

May import: everything but scripts.
"""
