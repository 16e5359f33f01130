"""What is done with a trained model: load it with its tokenizer, evaluate it, export it. No DeepSpeed."""
