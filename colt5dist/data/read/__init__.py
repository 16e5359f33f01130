"""Shards to batches: opening, reading, denoising, and the loader that delivers micro-batches."""
