"""What is wrong with preference data, said before anything is trained on it."""
