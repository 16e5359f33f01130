"""Text files to shards: tokenizing, holding documents out, writing. `prepare.py` is the entry."""
