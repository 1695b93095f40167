"""The same networks in this project and in PyTorch, timed in turns: `python -m benchmarks.paired`."""
