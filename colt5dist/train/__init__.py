"""The trainer: configuration, DeepSpeed engine, loop, checkpoints, monitoring."""
