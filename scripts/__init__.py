"""Doors to commands: ``python -m tarflow.scripts.NAME``, or in a clone ``python scripts/NAME.py``. The work is elsewhere.

May import: everything but scripts.
"""
