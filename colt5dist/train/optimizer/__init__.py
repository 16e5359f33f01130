"""Optimizers: which parameter gets which, Muon, and the moving average of the weights."""
