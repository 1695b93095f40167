"""One run: its settings, what it reads, the loop, and a trained stage opened."""
