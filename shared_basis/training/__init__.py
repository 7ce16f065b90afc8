"""Training: the step, the compiled program, the loop, and the initialisation of runs."""
