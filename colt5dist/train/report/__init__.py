"""What a user sees of a run: metrics and TensorBoard, speed, memory, dry run, summary, profile."""
