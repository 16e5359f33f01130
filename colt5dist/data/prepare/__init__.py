"""Text files to shards: finding the inputs, reading documents, tokenizing, writing. `prepare.py` is the entry."""
