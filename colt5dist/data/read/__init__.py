"""From shards to batches: opening, reading, denoising, and the loader that hands out micro-batches."""
