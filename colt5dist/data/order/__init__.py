"""The order of the data: which text and objective sample i has, which samples are skipped, which rank gets a sample."""
