"""Training: steps, program, loop, and how a run begins."""
