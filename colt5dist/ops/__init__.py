"""Numerical operators: a folder each, with one function as its door, and a readable reference beside the fast
version."""
