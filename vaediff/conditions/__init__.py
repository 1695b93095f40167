"""On what a diffusion is conditioned: one file per condition."""
