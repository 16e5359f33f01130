"""What protects a run: bad numbers, loss spikes, requests to stop, lost ranks, records of failures."""
