"""Models: loading and saving them, and reading log-probabilities off them."""
