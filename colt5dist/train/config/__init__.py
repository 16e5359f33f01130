"""The configuration of a run: its fields, the YAML file and command line, and what DeepSpeed sections may hold."""
