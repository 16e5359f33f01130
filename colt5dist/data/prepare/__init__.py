"""From text files to shards: finding inputs, reading documents, tokenizing, writing."""
