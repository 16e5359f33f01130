"""Attention of every kind: full, local, multi-query, over a memory; rotary and relative positions."""
