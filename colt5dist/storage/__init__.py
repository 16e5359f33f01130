"""What lies on disk, for all who read it: checkpoints, run folders, exported folders. No DeepSpeed, no processes."""
