"""The measured tables, a module each with a `main(arguments)`: what `launch/benchmark.py NAME` runs."""
