"""What a person sees of a run: metrics and TensorBoard, speed, memory, dry run, summary, profile."""
