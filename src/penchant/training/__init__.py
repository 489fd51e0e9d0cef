"""Training: the step, the loop, the run."""
