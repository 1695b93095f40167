"""Where a program runs, and what it costs there."""
