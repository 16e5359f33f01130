"""All that knows how DeepSpeed works inside: engine, optimizer, gradients, where weights and moments lie."""
