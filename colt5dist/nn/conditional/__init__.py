"""The conditional layers: a light branch on all tokens, a heavy branch on the routed ones."""
