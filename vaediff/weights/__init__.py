"""Files of weights: read, fetch, write."""
