"""Commands of one purpose each: ``python -m tarflow.scripts.NAME``, or in a clone ``python scripts/NAME.py``.

May import: everything but scripts.
"""
