"""The order of the data: text and objective of sample i, samples that are left out, and the rank that gets a sample."""
