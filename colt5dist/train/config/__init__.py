"""The configuration of a run: its keys, how they are read, and what the section `deepspeed:` may hold."""
